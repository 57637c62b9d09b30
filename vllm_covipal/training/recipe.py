"""A training recipe: one pydantic model, one field per dial, unknown keys refused."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from typing_extensions import Self

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Precision = Annotated[
    Literal["no", "bf16", "fp16"],
    BeforeValidator(lambda value: "no" if value is False else value),  # YAML's bare ``no``
]


class Section(BaseModel):
    """A part of the recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataRecipe(Section):
    """Image-text samples."""

    kind: Literal["shapes", "crowd", "jsonl"] = Field(
        "jsonl", description="generated scenes of a world of evaluation/scenes.py, or a file"
    )
    path: str | None = Field(
        None, description="file of samples in the LLaVA format, one JSON object a line"
    )
    images: str = Field(".", description="folder that the samples' image paths start from")

    @model_validator(mode="after")
    def _has_a_path(self) -> Self:
        if (self.kind == "jsonl") != (self.path is not None):
            raise ValueError("kind 'jsonl' needs a path, and generated scenes take none")
        return self


class ModuleRecipe(Section):
    """Sizes of the pruning module; what is left out follows the language model's width."""

    width: Count | None = Field(None, description="own width")
    num_blocks: Count = Field(2, description="attention blocks")
    num_heads: Count | None = Field(None, description="heads of each block")
    ffn_ratio: Positive = Field(2.0, description="width of a block's MLP over its own")
    text_first: bool = Field(True, description="the first block's keys are the text alone")
    spread_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="of the tokens kept when it is used, how many are spread over the rest; no "
        "training depends on it",
    )
    spread_by: Literal["even", "diverse"] = Field(
        "even", description="evenly, or by what is unlike all that is kept (diverse)"
    )

    def sizes(self) -> dict[str, Any]:
        """The fields that are set, for ``PruningModuleConfig.for_hidden_size``."""
        return self.model_dump(exclude_none=True)


class StageRecipe(Section):
    """One run of the optimizer. A step takes pictures x questions samples in each process."""

    num_steps: Annotated[int, Field(ge=0)] = Field(description="steps of the optimizer")
    pictures: Count = Field(8, description="samples of the data a step, in each process")
    questions: Count = Field(8, description="questions about each picture, at most")
    learning_rate: Positive = Field(1e-3, description="highest")
    final_learning_rate: Annotated[float, Field(ge=0)] = Field(0.0, description="at the last step")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(20, description="of a linear rise")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="AdamW's")
    max_grad_norm: Positive = Field(1.0, description="gradients are clipped to this length")
    type_weights: dict[str, Positive] = Field(
        {},
        description="type of question -> how readily it is drawn, 1 where not named; a file's "
        "samples name theirs by 'type'",
    )


class Stage1Recipe(StageRecipe):
    """Attention-guided."""

    guide_layer: Annotated[int, Field(ge=0)] | None = Field(
        None, description="decoder layer whose attention labels; default: two thirds of the way up"
    )
    rows: Literal["literal", "after", "last"] = Field(
        "after",
        description="queries that are summed: the last N_v rows (the paper's), those after the "
        "picture, or the prompt's last",
    )
    scaling: Literal["none", "mean", "log", "zscore", "rank"] = Field(
        "zscore", description="of the sums (the paper's: none)"
    )


class Stage2Recipe(StageRecipe):
    """End to end through a soft mask."""

    keep_ratio: tuple[Share, ...] = Field(
        (0.1,), description="budgets; a sample draws one of them", min_length=1
    )
    mask: Literal["sigmoid", "budgeted", "straight_through"] = Field(
        "sigmoid",
        description="retention: sigmoid of the score (with a budget term); sigmoid of the score "
        "less the threshold that meets the budget; or a hard top-k, soft in the backward pass",
    )
    positions: Literal["compact", "original"] = Field(
        "compact",
        description="of the tokens: as served, consecutive over what is left (where the family has "
        "M-RoPE its own stay), or the unpruned prompt's",
    )
    budget: Literal["squared", "absolute", "one_sided", "none"] = Field(
        "squared", description="budget term of mask 'sigmoid'"
    )
    budget_weight: Annotated[float, Field(ge=0)] = Field(10.0, description="of the budget term")
    temperature: Positive = Field(1.0, description="of the sigmoid, at the first step")
    final_temperature: Positive = Field(1.0, description="at the last step, by a straight line")
    noise: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="logistic noise on the scores, in units of the temperature: a token that is "
        "half kept is there in one step and not in the next, so that halves cost",
    )
    label_weight: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="of stage 1's loss beside the language model's: it holds the order of tokens "
        "that the answer does not hang on, which is arbitrary otherwise",
    )


class TrainRecipe(Section):
    """All that a training run depends on, beside the data themselves."""

    model: str = Field(description="LVLM as transformers takes it; frozen")
    out: str = Field(description="folder of the pruning module, checkpoints and curves")
    data: DataRecipe
    init: str | None = Field(
        None,
        description="folder of a pruning module to start from, stage 1's of another run, say: its "
        "sizes, and its spread_share, spread_by and max_text_tokens where the recipe does not give "
        "them",
    )
    seed: int = Field(0, description="of everything that is drawn")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the LVLM's weights"
    )
    mixed_precision: Precision = Field("no", description="accelerate's")
    gradient_checkpointing: bool = Field(
        False, description="recompute the LVLM's layers in stage 2's backward pass: less memory"
    )
    num_threads: Count | None = Field(None, description="torch's, on a CPU")
    max_text_tokens: Annotated[int, Field(ge=0, le=4096)] = Field(
        128,
        description="text that the module reads, the last of the image's turn; it records this, "
        "and serving reads as much",
    )
    max_answer_tokens: Count = Field(256, description="answers are cut to this length")
    checkpoint_steps: Count = Field(50, description="steps between checkpoints")
    log_steps: Count = Field(1, description="steps between rows of stage1.csv and stage2.csv")
    module: ModuleRecipe = ModuleRecipe()  # type: ignore[call-arg]
    stage1: Stage1Recipe
    stage2: Stage2Recipe


def leaves(section: type[BaseModel] = TrainRecipe, prefix: str = "") -> dict[str, str]:
    """Dotted name of every dial -> its description."""
    found: dict[str, str] = {}
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= leaves(inner, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = field.description or ""
    return found


def load_recipe(path: str | Path, overrides: dict[str, str] | None = None) -> TrainRecipe:
    """The recipe of a YAML file.

    Args:
        path: the file.
        overrides: dotted name -> value as YAML text, each in place of the file's.

    Raises:
        ValueError: one line that names file, key, value and what is allowed.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the recipe {path} ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(values).__name__}")
    for name, text in (overrides or {}).items():
        _override(values, name, text)
    try:
        return TrainRecipe.model_validate(values)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(str(path), e) for e in error.errors())) from None


def _override(values: dict[str, Any], name: str, text: str) -> None:
    """Put the value of a dotted name in place; a section that is missing or empty is made."""
    *sections, leaf = name.split(".")
    inner = values
    for i, section in enumerate(sections, start=1):
        if inner.get(section) is None:
            inner[section] = {}
        inner = inner[section]
        if not isinstance(inner, dict):
            raise ValueError(f"--{name}: {'.'.join(sections[:i])} is no section of the recipe")
    try:
        inner[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--{name}: not valid YAML: {str(error).splitlines()[0]}") from None


def _explain(source: str, error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{source}: unknown key {name!r}"
    if error["type"] == "missing":
        return f"{source}: {name} is missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{source}: {name}={error['input']!r}: {message}"
