"""CDPruner: rows that are unlike each other and like the question.

Shapes: C candidates, K to keep, T text tokens, D width.
Method: CDPruner (arXiv:2506.10967), greedy MAP of a determinantal point process with kernel
L = diag(q) S diag(q), S the rows' cosines, q their relevance rescaled to [0, 1]. Differs from
the release: no CLIP text tower is at hand behind a projector, so relevance is the mean cosine of
a row with the text context's embeddings in the language model's input space.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vllm_covipal.core.visual_item import VisualItem
from vllm_covipal.selectors.base import Selector, unit_rows
from vllm_covipal.selectors.cosines import Cosines

MIN_RELEVANCE = 1e-6
MIN_RESIDUAL = 1e-5
"""Squared distance to the span of the picks below which float32 says nothing more."""


def relevance(unit: Tensor, text: Tensor) -> Tensor:
    """Mean cosine with the text, rescaled to [MIN_RELEVANCE, 1 + MIN_RELEVANCE]; 1 without text.

    Args:
        unit: candidate rows of length one. [C, D], float32.
        text: [T, D].

    Returns:
        [C], float32.
    """
    if text.shape[0] == 0:
        return unit.new_ones(unit.shape[0])
    cosine = unit @ unit_rows(text).mean(0)
    low, high = cosine.aminmax()
    width = high - low
    scaled = (cosine - low) / torch.where(width > 0, width, 1)
    return torch.where(width > 0, scaled, 1) + MIN_RELEVANCE


def greedy_map(unit: Tensor, quality: Tensor, num_kept: int, start: Tensor | None = None) -> Tensor:
    """Greedy argmax of the determinant of L over K rows, by incremental Cholesky.

    The gain of a row is q^2 r, r its squared distance to the span of the rows already picked.
    The relevance stays out of the factor, so that one threshold on r serves every row; once all
    rows lie in the span, relevance alone decides.

    Args:
        unit: rows of length one. [C, D], float32.
        quality: q. [C], float32.
        num_kept: K, 1 <= K <= C.
        start: places that are picked already, fewer than K; None for none. int64.

    Returns:
        Places in the order of choice, ``start`` first. [K], int64.
    """
    given = [] if start is None else [start[i : i + 1] for i in range(len(start))]
    cosines = Cosines(unit)
    weight = quality.square()
    residual = unit.new_ones(unit.shape[0])
    gain = weight.clone()
    picks = torch.empty(num_kept, dtype=torch.int64, device=unit.device)
    factor = unit.new_empty(num_kept, unit.shape[0])
    for i in range(num_kept):
        # The first of equals.
        pick = given[i] if i < len(given) else gain.argmax(0, keepdim=True)
        picks[i : i + 1] = pick
        if i + 1 == num_kept:
            break
        row = cosines.row(pick)
        if i:
            done = factor[:i]
            row.addmv_(done.T, done.index_select(1, pick).squeeze(1), alpha=-1)
        left = residual.index_select(0, pick)
        row.mul_(torch.where(left > MIN_RESIDUAL, left.rsqrt(), 0))
        factor[i] = row
        residual.addcmul_(row, row, value=-1)
        torch.clamp(residual, min=MIN_RESIDUAL, out=gain).mul_(weight)
        gain.index_fill_(0, picks[: i + 1], -1)
    return picks


class CDPrunerSelector(Selector):
    """Conditional diversity: a DPP over the projector's rows, weighted by the text."""

    name: ClassVar[str] = "cdpruner"
    uses_text: ClassVar[bool] = True

    def _choose(self, items: Sequence[VisualItem]) -> list[Tensor]:
        chosen = []
        for item in items:
            unit = unit_rows(item.candidates())
            chosen.append(greedy_map(unit, relevance(unit, item.text), item.num_kept))
        return chosen
