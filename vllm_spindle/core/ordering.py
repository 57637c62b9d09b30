"""The best first, and of equals, which pooling and means make many, the earlier token.

Shapes: N tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_spindle.core.transfer import to_device

LOW_BITS = 0xFFFFFFFF
BY_NUMPY = {"cpu"}  # devices whose memory numpy sees


def best_first(scores: Tensor, *, num_turns: int | None = None) -> Tensor:
    """Indices in descending order of the scores, of equals the lowest first.

    On the CPU score and index are packed into one integer each, which numpy sorts by vectors:
    three times as fast as torch's stable sort, which is its twin. On a device turns are counted, in
    a few passes where a sort takes dozens.

    Args:
        scores: float32 without NaN, or int64 within 31 bits. [..., N].
        num_turns: if the scores are 0, -1, -2, .. and all above its negative, no two the same in a
            row, but for those that come last, whose indices then are undefined.

    Returns:
        [..., N], int64.
    """
    if scores.device.type not in BY_NUMPY:
        if num_turns is None:
            return scores.argsort(dim=-1, descending=True, stable=True)
        return _by_rank(turn_ranks(-scores.long(), num_turns))
    places = torch.arange(scores.shape[-1], device=scores.device)
    packed = (~_as_integers(scores) << 32) | places
    packed.numpy().sort(axis=-1)  # the same memory
    return packed & LOW_BITS


def ranks(scores: Tensor, *, num_turns: int | None = None) -> Tensor:
    """How many of its row come before each score; see ``best_first``. [..., N], int64."""
    if scores.device.type not in BY_NUMPY and num_turns is not None:
        return turn_ranks(-scores.long(), num_turns)
    return _by_rank(best_first(scores))


def turn_ranks(turns: Tensor, num_turns: int) -> Tensor:
    """How many turns of its row come before each, counted: no sort. [..., N], int64.

    Args:
        turns: below ``num_turns``, equals counted once. [..., N], int64.
        num_turns: how many there might be.
    """
    taken = turns.new_zeros((*turns.shape[:-1], num_turns), dtype=torch.int32)
    taken.scatter_(-1, turns, 1)
    # Over all rows at once, as a device scans one long row best; then less the rows before.
    counted = taken.flatten().cumsum(0, dtype=torch.int32).view(taken.shape)
    before = counted[..., :1] - taken[..., :1]
    return (counted.gather(-1, turns) - before - 1).long()


def ascending(ranked: Tensor, counts: Sequence[int], num_positions: int) -> Tensor:
    """The first positions of each row, ascending, one row behind the other.

    On the CPU each row is sorted. On a device positions are marked and counted, in a few passes
    over all rows at once, however long and many.

    Args:
        ranked: no position twice in a row. [R, at least the most], int64.
        counts: how many of each row. [R].
        num_positions: all lie below.

    Returns:
        [sum of counts], int64.
    """
    if len(set(counts)) == 1:
        ranked, counts = ranked[:, : counts[0]], counts[:0]
    if ranked.device.type in BY_NUMPY:
        if not counts:
            return ranked.sort(dim=-1).values.flatten()
        rows = [row[:count].sort().values for row, count in zip(ranked, counts, strict=True)]
        return torch.cat(rows)
    is_kept: Tensor | int = 1
    total = ranked.numel()
    if counts:
        total = sum(counts)
        own = to_device(torch.tensor(counts), ranked.device)
        is_kept = (torch.arange(ranked.shape[1], device=ranked.device) < own[:, None]).int()
    shape = (len(ranked), num_positions)
    marked = torch.zeros(shape, dtype=torch.int32, device=ranked.device).scatter_(
        1, ranked, is_kept
    )
    # What is not marked goes to one place behind the others.
    places = torch.where(marked > 0, marked.flatten().cumsum(0).view(shape) - 1, total)
    positions = torch.arange(num_positions, device=ranked.device).expand(shape)
    found = ranked.new_empty(total + 1)
    return found.scatter_(0, places.flatten(), positions.flatten())[:total]


def _by_rank(order: Tensor) -> Tensor:
    """The inverse of a permutation: ranks from an order, an order from ranks. [..., N], int64."""
    places = torch.arange(order.shape[-1], device=order.device)
    return torch.zeros_like(order).scatter_(-1, order, places.expand_as(order))


def _as_integers(scores: Tensor) -> Tensor:
    """Integers of 32 bits in the order of the scores, int64."""
    if scores.dtype == torch.int64:
        return scores
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0, its equal
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # among negatives, the other way round
