"""Stage 2's pruning that a gradient passes: scores -> retention -> a bias on the visual keys.

Shapes: C candidates of an item.
Method: after CoViPAL (arXiv:2508.17243) as later work describes it: every layer adds log p_k to the
scores of visual key k, so the key keeps the share p_k of its attention; p = 1 changes nothing and
p -> 0 removes the key. How scores become p is not known; three ways are here.
"""

from typing import Any

import torch
from torch import Tensor

RETENTION_FLOOR = 1e-4
"""Smallest share that is told from nothing: its logarithm is -9.2."""

DROPPED = -1e4
"""Bias of a key that is gone: exp of it is 0 in any dtype, and it leaves a causal mask finite."""

NUM_BISECTIONS = 40


def retention_bias(retention: Tensor, floor: float = RETENTION_FLOOR) -> Tensor:
    """What is added to the scores of each key: log max(p, floor)."""
    return retention.clamp(min=floor).log()


def sigmoid_retention(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """Each token's share by itself: a budget has to come from the loss. [C], range (0, 1)."""
    return torch.sigmoid(scores / temperature)


def budgeted_retention(scores: Tensor, num_kept: int, temperature: float = 1.0) -> Tensor:
    """sigmoid((s - t) / temperature), t such that the shares add up to ``num_kept``.

    Args:
        scores: [C], float32.
        num_kept: 0 < num_kept < C.
        temperature: the smaller, the closer to a hard choice.

    Returns:
        [C], range (0, 1).

    Raises:
        ValueError: if ``num_kept`` is out of range.
    """
    if not 0 < num_kept < scores.shape[0]:
        raise ValueError(f"num_kept must be in (0, {scores.shape[0]}), got {num_kept}")
    return _Budgeted.apply(scores, num_kept, temperature)  # type: ignore[no-any-return, no-untyped-call]


class _Budgeted(torch.autograd.Function):
    """Threshold by bisection, gradient by the implicit function theorem."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, num_kept: int, temperature: float) -> Tensor:
        low, high = scores.min() - 40 * temperature, scores.max() + 40 * temperature
        for _ in range(NUM_BISECTIONS):
            middle = (low + high) / 2
            is_too_low = torch.sigmoid((scores - middle) / temperature).sum() > num_kept
            low = torch.where(is_too_low, middle, low)
            high = torch.where(is_too_low, high, middle)
        shares = torch.sigmoid((scores - (low + high) / 2) / temperature)
        ctx.save_for_backward(shares)
        ctx.temperature = temperature
        return shares

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (shares,) = ctx.saved_tensors
        slope = shares * (1 - shares)
        mean = (slope * grads[0]).sum() / slope.sum().clamp(min=1e-12)
        return slope / ctx.temperature * (grads[0] - mean), None, None


def compact_positions(key_bias: Tensor) -> Tensor:
    """Positions as serving gives them: a token moves up by what is left out before it.

    A half-kept token moves those after it by half a place, so a hard choice gives the positions of
    the pruned prompt and no choice those of the whole one.

    Args:
        key_bias: log shares, 0 for keys that are not visual. [B, T].

    Returns:
        [B, T], float32; no gradient passes.
    """
    shares = key_bias.detach().float().exp().clamp(max=1.0)
    return shares.cumsum(-1) - shares


def straight_through_bias(
    scores: Tensor, kept: Tensor, temperature: float = 1.0, floor: float = RETENTION_FLOOR
) -> Tensor:
    """Hard forward, soft backward: 0 for kept tokens, ``DROPPED`` for the others.

    A key that is gone has no attention, so no gradient: only kept tokens learn, by the gradient of
    log sigmoid.

    Args:
        scores: [C].
        kept: places that stay, [K], int64.
        temperature: of the backward's sigmoid.
        floor: of the backward's share.

    Returns:
        [C].
    """
    hard = torch.full_like(scores, DROPPED).index_fill(0, kept, 0.0)
    soft = retention_bias(sigmoid_retention(scores, temperature), floor)
    return hard + (soft - soft.detach())
