"""Choose the context tokens that a layer keeps, from their scores and a budget.

Shapes: K kv heads, G query heads per kv head, C context tokens, N tokens to keep.
Method: SpindleKV sec. 3.2-3.3, eq. 7 (arXiv:2507.06517). Differs from the paper under GQA: the
paper unfolds the cache so that every query head keeps its own tokens (``unfold``, the
reference); ``union`` lets every query head choose and stores each chosen token once per kv head.
"""

from typing import Literal

import torch
from torch import Tensor

from vllm_spindle.core.ordering import best_first

GqaName = Literal["union", "mean", "unfold"]


def select_kept(scores: Tensor, num_kept: int, gqa: GqaName) -> Tensor:
    """Positions to keep, ascending; see ``rank_tokens``."""
    return rank_tokens(scores, num_kept, gqa).sort(dim=-1).values


def rank_tokens(
    scores: Tensor, num_kept: int, gqa: GqaName, *, num_turns: int | None = None
) -> Tensor:
    """Positions to keep, the most important first.

    Args:
        scores: importance per query head, higher is kept. [K, G, C], float32.
        num_kept: tokens to keep (N), 0 <= N <= C; per kv head, or per query head with
            ``unfold``, whose copies cost their own bytes.
        gqa: how the query heads of a group decide.
        num_turns: if the scores are turns; see ``ordering.best_first``.

    Returns:
        int64 positions: [K, N], with ``unfold`` [K, G, N].

    Raises:
        ValueError: if ``num_kept`` is out of range or ``gqa`` is unknown.
    """
    if not 0 <= num_kept <= scores.shape[-1]:
        raise ValueError(f"num_kept must be in [0, {scores.shape[-1]}], got {num_kept}")
    if gqa == "union":
        return rank_union(scores, num_kept, num_turns=num_turns)
    if gqa == "mean":
        return _top(scores.mean(dim=1), num_kept)
    if gqa == "unfold":
        return _top(scores, num_kept, num_turns)
    raise ValueError(f"gqa must be union, mean or unfold, got {gqa!r}")


def rank_union(scores: Tensor, num_kept: int, *, num_turns: int | None = None) -> Tensor:
    """Union of the query heads' choices, filled by rank until the budget is spent.

    The heads of a group take turns: first the best token of each head, then the second best,
    and so on, skipping tokens that are already in. So no head's favourites are outvoted, and
    two heads that agree leave room for both to reach further.

    Args:
        scores: [K, G, C].
        num_kept: N, per kv head.
        num_turns: if the scores are turns; see ``ordering.best_first``.

    Returns:
        Positions, best first. [K, N], int64.
    """
    num_kv_heads, group, num_context = scores.shape
    if group == 1:
        return _top(scores[:, 0], num_kept, num_turns)
    # No head's rank beyond N can enter: one head alone fills the budget by then.
    best = _top(scores, num_kept, num_turns)
    turn = torch.arange(num_kept * group, device=scores.device).view(num_kept, group).T
    turns = scores.new_full((num_kv_heads, num_context), num_kept * group, dtype=torch.int64)
    turns.scatter_reduce_(
        1, best.flatten(1), turn.reshape(1, -1).expand(num_kv_heads, -1), reduce="amin"
    )
    # Tokens that no head chose share the last turn; the others are as many as the budget at least.
    return _top(-turns, num_kept, num_kept * group + 1)


def _top(scores: Tensor, num_kept: int, num_turns: int | None = None) -> Tensor:
    return best_first(scores, num_turns=num_turns)[..., :num_kept]


def gather_kept(tokens: Tensor, kept: Tensor) -> Tensor:
    """Rows of the kept tokens, chosen per kv head.

    Args:
        tokens: keys or values. [K, T, D].
        kept: positions. [K, N].

    Returns:
        [K, N, D], stored token by token: its transpose [N, K, D] is contiguous, as a cache write
        takes it.
    """
    num_kv_heads, num_tokens, head_size = tokens.shape
    first = torch.arange(num_kv_heads, device=kept.device).unsqueeze(1) * num_tokens
    rows = tokens.reshape(-1, head_size).index_select(0, (kept + first).T.flatten())
    return rows.view(-1, num_kv_heads, head_size).transpose(0, 1)
