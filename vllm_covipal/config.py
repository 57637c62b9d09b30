"""What the user may set: one pydantic model, one field per dial, unknown keys refused."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

KEEP_RATIO_KEY = "covipal_keep_ratio"
"""Per-request override: ``mm_processor_kwargs`` (offline, HTTP) or ``vllm_xargs`` (HTTP)."""


class CovipalConfig(BaseModel):
    """Visual-token pruning as asked for under ``additional_config["covipal"]``.

    ``keep_ratio`` 1.0 (the default) prunes only the requests that ask for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    keep_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="share of each image's or video's visual tokens that reach the language "
        "model, rounded up; newlines and separators are kept beside it",
    )
    selector: Literal["ppm", "random", "grid", "divprune", "cdpruner"] = Field(
        "ppm", description="what chooses: a trained pruning module, or a training-free method"
    )
    ppm: str | None = Field(
        None, description="folder of the pruning module (config.json, model.safetensors)"
    )
    max_text_tokens: Annotated[int, Field(ge=0, le=4096)] | None = Field(
        None,
        description="text tokens that a text-aware selector reads, the last of the image's turn; "
        "default: as many as the pruning module was trained to read, 128 for 'cdpruner'",
    )
    turn_end: Annotated[tuple[str, ...], Field(strict=False)] | None = Field(
        None,
        description="texts that end a user's turn, after which no text counts; default: read off "
        "the chat template that a prompt was rendered with",
    )
    reuse_mib: Annotated[int, Field(ge=0)] = Field(
        64,
        description="MiB of unpruned visual embeddings each worker keeps, so that another question "
        "on an image does not run the vision tower again; 0 keeps none",
    )
    seed: int = Field(0, description="seed of the 'random' selector")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.selector == "ppm" and self.ppm is None:
            raise ValueError(
                "selector 'ppm' needs the folder of a pruning module: set 'ppm', or choose a "
                "training-free selector (random, grid, divprune, cdpruner)"
            )
        if self.selector != "ppm" and self.ppm is not None:
            raise ValueError(f"'ppm' is given but selector={self.selector!r} does not read it")
        return self


def load_config(value: Any) -> CovipalConfig:
    """The configuration that the user's value stands for.

    Args:
        value: a dict of fields, or the path of a YAML file that holds one.

    Raises:
        ValueError: one line that names the key or field, its value, what is allowed, and for a
            misspelt key the nearest valid one.
    """
    source = "covipal"
    if isinstance(value, str | Path):
        source = str(value)
        value = _read_yaml(Path(value))
    if isinstance(value, CovipalConfig):
        return value
    if not isinstance(value, dict):
        raise ValueError(
            f"{source}: expected a mapping of options or the path of a YAML file, got "
            f"{type(value).__name__} {value!r}; for example "
            '\'{"covipal": {"selector": "divprune", "keep_ratio": 0.25}}\''
        )
    try:
        return CovipalConfig.model_validate(value)
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


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"covipal: cannot read the configuration file {path} ({error.strerror}); give the "
            "path of a YAML file, or the options themselves as a JSON object"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None


def _explain(source: str, error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = list(CovipalConfig.model_fields)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(known)}"
        return f"{source}: unknown key {name!r}; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if not name:
        return f"{source}: {message}"
    return f"{source}: {name}={error['input']!r}: {message}"
