"""The pruning module (PPM): one score per visual token, from visual and text embeddings.

Shapes: per item C candidates, T text tokens, R = C + 1 + T rows in the order [visual, null,
text]; M rows of all items; D width of the language model, m own width, H heads.
Method: CoViPAL (arXiv:2508.17243) sec. 3 gives the interface (S = p(H_v, H_t), before the
language model) and no architecture. The architecture here is ours: rows of length one, linear
D -> m, type embeddings, pre-norm blocks, a scalar head on the visual rows.

- The first block's keys are the text rows alone, so that visual rows meet the question before
  they meet each other: with all rows as keys a spike learned an order of magnitude slower.
- A learned null row stands before the text: something to attend to where no word applies, and
  where there is no text.
- Text rows carry their distance from the end of the text; visual rows have their place in the
  picture from the vision tower.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_covipal.core.ragged_attention import RaggedAttention
from vllm_covipal.core.text_context import MAX_TEXT_TOKENS

HEAD_SIZE = 64
MIN_LENGTH = 1e-12
"""Of a row, so that a row of zeros stays one."""

SpreadName = Literal["even", "diverse"]


@dataclass(frozen=True, slots=True)
class PruningModuleConfig:
    """Sizes of a pruning module, and which model it was trained for.

    Attributes:
        hidden_size: width of the language model (D).
        width: own width (m), a multiple of ``num_heads``.
        num_blocks: attention blocks, at least 1.
        num_heads: heads of each block (H).
        ffn_ratio: width of a block's MLP over m.
        text_first: the first block's keys are the text rows alone.
        spread_share: of the tokens to keep, how many are spread over what is not scored highest: a
            model may take the rest of the picture as a yardstick, for counting above all, and
            where little is found what scores next resembles it. [0, 1).
        spread_by: how: evenly over the picture's order, or by what is unlike all that is kept.
        max_text_tokens: text tokens it was trained to read, the last of the image's turn.
        fingerprint: of the LVLM it was trained for, from ``fingerprint.fingerprint``; empty for
            an untrained module.
        trained_for: that LVLM's name, for people.
    """

    hidden_size: int
    width: int
    num_blocks: int = 2
    num_heads: int = 4
    ffn_ratio: float = 2.0
    text_first: bool = True
    spread_share: float = 0.0
    spread_by: SpreadName = "even"
    max_text_tokens: int = MAX_TEXT_TOKENS
    fingerprint: str = ""
    trained_for: str = ""

    def __post_init__(self) -> None:
        """Refuse sizes that make no module.

        Raises:
            ValueError: if a size is out of range.
        """
        for name in ("hidden_size", "width", "num_blocks", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is no multiple of num_heads {self.num_heads}")
        if self.ffn_ratio <= 0:
            raise ValueError(f"ffn_ratio must be positive, got {self.ffn_ratio}")
        if not 0 <= self.spread_share < 1:
            raise ValueError(f"spread_share must be in [0, 1), got {self.spread_share}")
        if self.spread_by not in get_args(SpreadName):
            raise ValueError(f"spread_by must be even or diverse, got {self.spread_by!r}")
        if self.max_text_tokens < 0:
            raise ValueError(f"max_text_tokens must be at least 0, got {self.max_text_tokens}")

    @classmethod
    def for_hidden_size(cls, hidden_size: int, **changes: Any) -> "PruningModuleConfig":
        """The default for a language model of that width: m about D / 8, 64 to 512."""
        steps = round(hidden_size / 8 / HEAD_SIZE)
        width = min(max(steps * HEAD_SIZE, 64), 512)
        defaults = {"width": width, "num_heads": width // HEAD_SIZE}
        return cls(hidden_size=hidden_size, **(defaults | changes))

    @classmethod
    def from_json(cls, text: str) -> "PruningModuleConfig":
        """The configuration that ``to_json`` wrote.

        Raises:
            ValueError: if it is not JSON, or its keys are not ours.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {type(values).__name__}")
        known = {field.name for field in fields(cls)}
        # Modules made before there were these have none.
        missing = sorted(known - set(values) - {"spread_share", "spread_by", "max_text_tokens"})
        unknown = sorted(set(values) - known)
        if unknown or missing:
            raise ValueError(f"unknown keys {unknown}, missing keys {missing}")
        return cls(**values)

    def to_json(self) -> str:
        """All fields as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"


class Block(nn.Module):
    """Pre-norm attention and MLP over the rows of several items, each item apart."""

    def __init__(self, config: PruningModuleConfig) -> None:
        """Args: config: sizes."""
        super().__init__()
        width, inner = config.width, int(config.width * config.ffn_ratio)
        self.num_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, rows: Tensor, attention: RaggedAttention, key_rows: Tensor | None) -> Tensor:
        """Rows after the block.

        Args:
            rows: [M, m].
            attention: which keys belong to which queries.
            key_rows: the rows that are keys, ascending; None for all. [number of keys].

        Returns:
            [M, m].
        """
        normed = self.attention_norm(rows)
        keyed = normed if key_rows is None else normed.index_select(0, key_rows)
        query = self.query(normed).unflatten(1, (self.num_heads, -1))
        key, value = self.key_value(keyed).unflatten(1, (2, self.num_heads, -1)).unbind(1)
        mixed: Tensor = self.output(attention(query, key, value).flatten(1))
        rows = rows + mixed
        return rows + self.mlp(self.mlp_norm(rows))  # type: ignore[no-any-return]


class PruningModule(nn.Module):
    """Scores of visual tokens, higher is kept.

    Computes in float32, but for the first product where embeddings come in half precision: with
    weights rounded as they are it loses no more than they did, and takes a quarter of the time.
    """

    def __init__(self, config: PruningModuleConfig) -> None:
        """Args: config: sizes and provenance."""
        super().__init__()
        self.config = config
        width = config.width
        self.project = nn.Linear(config.hidden_size, width)
        self.visual_type = nn.Parameter(torch.randn(width) * 0.02)
        self.text_type = nn.Parameter(torch.randn(width) * 0.02)
        self.null_text = nn.Parameter(torch.randn(width) * 0.02)
        self.position_gain = nn.Parameter(torch.tensor(0.1))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.head_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)

    def forward(self, visual: Sequence[Tensor], text: Sequence[Tensor]) -> Tensor:
        """Scores of all items' candidates, one item after the other.

        Items share the matrix products and nothing else. Between batches of other shapes those
        may round differently; ``score_items`` is the one that does not.

        Args:
            visual: candidates of each item, any scale. [C, D] each.
            text: text context of each item, T may be 0. [T, D] each.

        Returns:
            [sum of C], float32.
        """
        rows = self._embed(visual, text)
        num_visual = [int(item.shape[0]) for item in visual]
        num_text = [1 + int(item.shape[0]) for item in text]
        num_rows = [v + t for v, t in zip(num_visual, num_text, strict=True)]
        # Known from the counts, and so without a wait for the device.
        is_visual = _alternating(num_visual, num_text)
        text_rows, visual_rows = (
            mask.nonzero().squeeze(1).to(rows.device) for mask in (~is_visual, is_visual)
        )
        to_text = RaggedAttention(num_rows, num_text)
        to_all = RaggedAttention(num_rows, num_rows)
        for i, block in enumerate(self.blocks):
            if i == 0 and self.config.text_first:
                rows = block(rows, to_text, text_rows)
            else:
                rows = block(rows, to_all, None)
        scores: Tensor = self.head(self.head_norm(rows.index_select(0, visual_rows)))
        return scores.squeeze(1)

    @torch.no_grad()
    def score_items(self, visual: Sequence[Tensor], text: Sequence[Tensor]) -> list[Tensor]:
        """Scores of each item, for choosing: they do not depend on its batch mates.

        On a CPU to the bit, item by item, which costs nothing there; on a GPU, where one batch is
        much faster, up to rounding.

        Args:
            visual: [C, D] each.
            text: [T, D] each.

        Returns:
            [C] each, float32.
        """
        if self.head.weight.is_cuda:
            counts = [int(item.shape[0]) for item in visual]
            return list(self(visual, text).split(counts))
        return [self([rows], [context]) for rows, context in zip(visual, text, strict=True)]

    def _embed(self, visual: Sequence[Tensor], text: Sequence[Tensor]) -> Tensor:
        """Rows of all items, [visual, null, text] each. [M, m]."""
        parts = [part for pair in zip(visual, text, strict=True) for part in pair]
        rows = torch.cat(parts)
        # Unit mean square: embeddings of any scale, and a linear layer sees what it was made for.
        # Scaled behind the product, where rows are m wide and not D.
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float32)
        scale = math.sqrt(self.config.hidden_size) / lengths.clamp(min=MIN_LENGTH)
        projected = F.linear(rows, self.project.weight.to(rows.dtype)).float()
        projected = projected * scale + self.project.bias
        embedded: list[Tensor] = []
        for i, of_part in enumerate(projected.split([int(part.shape[0]) for part in parts])):
            if i % 2 == 0:
                embedded.append(of_part + self.visual_type)
            else:
                embedded.append((self.null_text + self.text_type).unsqueeze(0))
                places = _distance_waves(of_part.shape[0], self.config.width, of_part.device)
                embedded.append(of_part + self.text_type + self.position_gain * places)
        return torch.cat(embedded)


def _alternating(num_visual: Sequence[int], num_text: Sequence[int]) -> Tensor:
    """True for the visual rows of [visual, text] item after item. [M] bool, on the CPU."""
    counts = [count for pair in zip(num_visual, num_text, strict=True) for count in pair]
    kinds = torch.tensor([True, False]).repeat(len(num_visual))
    return kinds.repeat_interleave(torch.tensor(counts))


def _distance_waves(num_tokens: int, width: int, device: torch.device) -> Tensor:
    """Sines and cosines of each token's distance from the last one. [T, m], range (-1, 1)."""
    distance = torch.arange(num_tokens - 1, -1, -1, device=device, dtype=torch.float32)
    exponent = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    angle = distance.unsqueeze(1) * torch.exp(exponent * -math.log(10000.0))
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width]
