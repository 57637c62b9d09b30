"""What the user may set: one pydantic model, one field per dial, unknown keys refused."""

import difflib
import json
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from vllm_spindle.core.profile import make_profile

KEEP_RATIO_KEY = "spindle_keep_ratio"
"""Per-request override, in ``vllm_xargs`` (HTTP) or ``SamplingParams.extra_args``."""

PROTECTED_PREFIX_KEY = "spindle_protected_prefix_tokens"
"""Per-request override of ``protected_prefix_tokens``, in the same place."""


MethodName = Literal["evict", "merge", "both"]

PackedShares = tuple[tuple[float, tuple[tuple[float, ...], ...]], ...]
"""``head_shares`` as it is kept: (mean share, share of each kv head [L][K]), hashable."""


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What a request sets for itself; None for the server's.

    Attributes:
        keep_ratio: (0, 1].
        protected_prefix_tokens: 0 for none.
    """

    keep_ratio: float | None = None
    protected_prefix_tokens: int | None = None


class SpindleConfig(BaseModel):
    """SpindleKV as asked for under ``additional_config["spindle"]``.

    ``keep_ratio`` 1.0 (the default) switches everything off: the engine is stock.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    keep_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="share of each prompt's KV bytes kept over all layers, counted against the "
        "model's true GQA cache, whole blocks, padding included; of what follows a "
        "protected prefix",
    )
    method: MethodName = Field(
        "evict",
        description="what a band does with its context: evict tokens; merge them, all that find an "
        "entry in a codebook; or both, with fewer codes and more entries",
    )
    band_methods: Annotated[tuple[MethodName, ...], Field(strict=False, min_length=1)] | None = (
        Field(None, description="a method per band, shallow to deep, in place of 'method'")
    )
    merge_factor: Annotated[float, Field(ge=1, le=64)] = Field(
        2.0, description="under 'both': most tokens merged into the space of one"
    )
    key_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="share of a codebook's entries that goes to keys, the rest to values"
    )
    theta_key: Annotated[float, Field(gt=0, le=1)] = Field(
        0.98, description="cosine above which a key may share an entry"
    )
    theta_value: Annotated[float, Field(gt=0, le=1)] = Field(
        0.95, description="cosine above which a value may share an entry"
    )
    window: Annotated[int, Field(ge=1, le=1024)] = Field(
        32, description="last prompt tokens whose queries score the context"
    )
    recent: Annotated[int, Field(ge=1, le=1024)] = Field(
        8, description="last prompt tokens that are kept in any case"
    )
    score: Literal["received", "pooled", "paper", "random"] = Field(
        "received",
        description="importance of a token: the window's attention and, in turns with it, the most "
        "that any observer paid from afar, for questions yet to come; the window's alone (pooled); "
        "the paper's eq. 2 literally; or random (a baseline)",
    )
    observers: Annotated[int, Field(ge=1, le=8192)] = Field(
        256,
        description="most tokens before the window whose queries score under 'received', spread "
        "over the last half of the prompt",
    )
    last_query: bool = Field(
        True,
        description="under 'received', the prompt's last query, which answers, chooses in turns "
        "with the window that it belongs to",
    )
    reduce_after: Annotated[int, Field(ge=0, le=1024)] = Field(
        0,
        description="output tokens decoded over the whole prompt before it is reduced; under "
        "'received' and 'pooled' what they look at takes turns with the window. An answer that "
        "ends before is never reduced; until then a request holds all its blocks",
    )
    pool_kernel: Annotated[int, Field(ge=1, le=63)] = Field(
        5,
        description="neighbours (tokens, odd) that 'received' and 'pooled' take the maximum over",
    )
    gqa: Literal["union", "mean", "unfold"] = Field(
        "union",
        description="how the query heads of a kv head choose: each for itself, stored once; by "
        "their mean; or each for itself with a copy of its own (reference)",
    )
    budget: Literal["auto", "measured", "uniform", "pyramid"] = Field(
        "auto",
        description="measured: every kv head keeps a share of its own, as 'vllm-spindle profile' "
        "found it; uniform: all the same; pyramid: deeper bands keep fewer tokens; auto: measured "
        "where there is a profile, in head_shares or beside the model, else uniform",
    )
    head_shares: Annotated[PackedShares, Field(strict=False)] | None = Field(
        None,
        description="mean share of the context: share of each kv head of each layer; or the path "
        "of a profile. Default: spindle-profile.json in the model's folder",
    )
    beta: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05, description="share of the context that the deepest layer keeps under 'pyramid'"
    )
    num_bands: Annotated[int, Field(ge=1, le=64)] | None = Field(
        None, description="bands of layers, one KV-cache group each; default: 2 to 8, by divisor"
    )
    deep_visual_share: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0,
        description="visual tokens that the deepest band keeps, over what would be proportional; "
        "bands above it linearly up to 1. 1.0 makes no difference between visual tokens and text",
    )
    min_prompt_len: Annotated[int, Field(ge=0)] = Field(
        128, description="prompts shorter than this many tokens are kept whole"
    )
    protected_prefix_tokens: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        0,
        description="first prompt tokens that every band keeps whole, so that requests share their "
        "blocks (a system prompt); 'auto' finds prefixes from which prompts have branched off",
    )
    reduce_share: Annotated[float, Field(gt=0, le=16)] = Field(
        1.0,
        description="prompt tokens reduced in one engine step, over the tokens that a step may "
        "compute (max_num_batched_tokens); the rest waits for the next steps",
    )
    seed: int = Field(0, description="seed of the 'random' baseline")

    @field_validator("protected_prefix_tokens", mode="before")
    @classmethod
    def _length_or_auto(cls, value: Any) -> Any:
        is_length = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not is_length and value != "auto":
            raise ValueError("must be a number of tokens, 0 or more, or 'auto'")
        return value

    @field_validator("head_shares", mode="before")
    @classmethod
    def _packed(cls, value: Any) -> Any:
        if isinstance(value, str | Path):
            value = read_profile(Path(value)).head_shares
        if isinstance(value, dict):
            value = value.items()
        if value is None:
            return None
        try:
            packed = tuple(
                (float(mean), tuple(tuple(map(float, heads)) for heads in shares))
                for mean, shares in value
            )
        except TypeError:
            raise ValueError(
                "must be the path of a profile, or mean share: shares of each kv head, layer by "
                "layer"
            ) from None
        make_profile(dict(packed))
        return packed

    @field_validator("pool_kernel")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("must be odd, so that the pool is centred on its token")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.merges and self.gqa == "unfold":
            raise ValueError(
                "gqa='unfold' makes copies for a codebook to absorb, and how large that gets is "
                "known after the data only, so it is not served: use 'union' or 'mean' with "
                "method 'merge' or 'both'; 'vllm-spindle calibrate' measures the unfolded route"
            )
        if self.budget == "measured" and (self.merges or self.gqa == "unfold"):
            with_what = "gqa='unfold'" if self.gqa == "unfold" else "methods that merge"
            raise ValueError(
                f"budget='measured' gives each kv head blocks of its own, which {with_what} cannot "
                "use: take budget 'uniform' or 'pyramid', or method 'evict' and gqa 'union'"
            )
        if self.head_shares is not None and self.budget not in ("auto", "measured"):
            raise ValueError(
                f"head_shares is what budget='measured' is made of, got budget={self.budget!r}; "
                "leave one of them out"
            )
        if self.band_methods is not None and self.num_bands not in (None, len(self.band_methods)):
            raise ValueError(
                f"band_methods names {len(self.band_methods)} bands, num_bands={self.num_bands}"
            )
        return self

    @property
    def merges(self) -> bool:
        """Whether any band has a codebook."""
        methods = (self.method,) if self.band_methods is None else self.band_methods
        return any(method != "evict" for method in methods)

    @property
    def num_observers(self) -> int:
        """Most tokens before the window that score."""
        return self.observers if self.score == "received" else 0

    @property
    def is_on(self) -> bool:
        """Whether anything may be evicted at all."""
        return self.keep_ratio < 1


@dataclass(frozen=True, slots=True)
class ProfileFile:
    """What ``vllm-spindle profile`` writes.

    Attributes:
        head_shares: as the dial of that name.
        num_bands: bands that it was measured for; a dial that is set wins.
    """

    head_shares: Any
    num_bands: int | None = None


PROFILE_FILE = "spindle-profile.json"
"""In a model's folder."""


def read_profile(path: Path) -> ProfileFile:
    """A profile.

    Raises:
        ValueError: if it cannot be read, or is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        shares = {float(mean): each for mean, each in found["head_shares"].items()}
        make_profile(shares)
        return ProfileFile(shares, found.get("num_bands"))
    except OSError as error:
        raise ValueError(
            f"cannot read the profile {path} ({error.strerror}); make one with 'vllm-spindle "
            "profile MODEL'"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no profile ({error}); make one with 'vllm-spindle profile MODEL'"
        ) from None


def with_profile(config: SpindleConfig, model: str) -> SpindleConfig:
    """The configuration for a model: ``auto`` decided, ``measured`` with its shares.

    Args:
        config: as the user gave it.
        model: folder or name; only a folder can have a profile beside it.

    Raises:
        ValueError: if budgets are to be measured and nothing was.
    """
    if config.budget not in ("auto", "measured"):
        return config
    found = ProfileFile(config.head_shares)
    if found.head_shares is None and (Path(model) / PROFILE_FILE).is_file():
        found = read_profile(Path(model) / PROFILE_FILE)
    usable = not config.merges and config.gqa != "unfold"
    if config.budget == "auto" and (found.head_shares is None or not usable):
        return config.model_copy(update={"budget": "uniform", "head_shares": None})
    if found.head_shares is None:
        raise ValueError(
            f"spindle: budget=measured: no {PROFILE_FILE} in {model}; make one with 'vllm-spindle "
            f"profile {model}', or use budget uniform"
        )
    dials = config.model_dump() | {"budget": "measured", "head_shares": found.head_shares}
    if config.num_bands is None and config.band_methods is None:
        dials["num_bands"] = found.num_bands
    return load_config(dials)


def load_config(value: Any) -> SpindleConfig:
    """The configuration that the user's value stands for.

    Args:
        value: a dict of fields, or the path of a YAML file that holds one.

    Raises:
        ValueError: one line that names the key or field, its value, what is allowed, and for a
            misspelt key the nearest valid one.
    """
    source = "spindle"
    if isinstance(value, str | Path):
        source = str(value)
        value = _read_yaml(Path(value))
    if isinstance(value, SpindleConfig):
        return value
    if not isinstance(value, dict):
        raise ValueError(
            f"{source}: expected a mapping of options or the path of a YAML file, got "
            f"{type(value).__name__} {value!r}; for example "
            '\'{"spindle": {"keep_ratio": 0.25}}\''
        )
    try:
        return SpindleConfig.model_validate(value)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(source, e) for e in error.errors())) from None


def parse_keep_ratio(value: Any) -> float:
    """A per-request keep ratio.

    Raises:
        ValueError: if it is not a number in (0, 1].
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{KEEP_RATIO_KEY} must be a number in (0, 1], got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{KEEP_RATIO_KEY} must be in (0, 1], got {value}")
    return float(value)


def parse_protected_prefix(value: Any) -> int:
    """A per-request protected prefix, in tokens.

    Raises:
        ValueError: if it is not a whole number, 0 or more.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # The range comes first: infinity and NaN are not in it, and have no ``int``.
    if not is_number or not 0 <= value < inf or value != int(value):
        raise ValueError(
            f"{PROTECTED_PREFIX_KEY} must be a whole number of tokens, 0 or more, got {value!r}"
        )
    return int(value)


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"spindle: cannot read the configuration file {path} ({error.strerror}); give the "
            "path of a YAML file, or the options themselves as a JSON object"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None


def _explain(source: str, error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = list(SpindleConfig.model_fields)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(known)}"
        return f"{source}: unknown key {name!r}; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if not name:
        return f"{source}: {message}"
    return f"{source}: {name}={error['input']!r}: {message}"
