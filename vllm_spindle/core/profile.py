"""Measured budgets: what share of the context each kv head of each layer keeps. No torch.

A profile is a list of points, each the shares of every head at one mean share; between two points
they lie on the line between them. So a share of the bytes becomes counts before the data, as
everything that the scheduler must know does, and the scheduler sees a band's mean alone.

Shapes: L layers, K kv heads.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction

from vllm_spindle.core.budget_sharing import fill, share_out

HeadShares = tuple[tuple[Fraction, ...], ...]
"""Share of the context that each kv head keeps, [L][K]."""

Profile = tuple[HeadShares, ...]
"""Points by falling mean share."""


def make_profile(points: Mapping[float, Sequence[Sequence[float]]]) -> Profile:
    """The profile that a file's points stand for; everything and nothing are added.

    Args:
        points: mean share of the context -> share of each kv head, [L][K], in [0, 1].

    Raises:
        ValueError: if points differ in shape, or a share or a mean is not what it says.
    """
    if not points:
        raise ValueError("no point")
    shapes = {tuple(len(heads) for heads in shares) for shares in points.values()}
    if len(shapes) != 1 or len(set(next(iter(shapes)))) != 1 or 0 in next(iter(shapes)):
        raise ValueError("every point needs one share for each kv head of each layer")
    (shape,) = shapes
    found = []
    for mean, shares in points.items():
        exact = tuple(tuple(Fraction(str(share)) for share in heads) for heads in shares)
        if any(not 0 <= share <= 1 for heads in exact for share in heads):
            raise ValueError(f"point {mean}: shares must be in [0, 1]")
        if not abs(float(mean_share(exact)) - float(mean)) <= 0.01:  # nor if the mean is NaN
            raise ValueError(f"point {mean}: its shares have a mean of {float(mean_share(exact))}")
        found.append(exact)
    ends = [((Fraction(share),) * shape[0],) * len(shape) for share in (1, 0)]
    return tuple(sorted({*found, *ends}, key=mean_share, reverse=True))


def mean_share(shares: HeadShares) -> Fraction:
    """Over all layers and heads."""
    total = sum((share for heads in shares for share in heads), Fraction(0))
    return total / (len(shares) * len(shares[0]))


def shares_at(profile: Profile, mean: Fraction) -> HeadShares:
    """The share of each head where all together keep ``mean`` of the context, [0, 1]."""
    for above, below in zip(profile, profile[1:], strict=False):
        high, low = mean_share(above), mean_share(below)
        if low <= mean <= high:
            part = (mean - low) / (high - low) if high > low else Fraction(0)
            return tuple(
                tuple(b + part * (a - b) for a, b in zip(up, down, strict=True))
                for up, down in zip(above, below, strict=True)
            )
    raise ValueError(f"mean share must be in [0, 1], got {mean}")


def head_blocks(shares: Sequence[Fraction], total: int, cap: int) -> tuple[int, ...]:
    """Blocks that each kv head of a layer keeps of its context.

    Args:
        shares: of each head; only their proportions count. [K].
        total: blocks of all of them together, at most ``K * cap``.
        cap: blocks of the context.
    """
    quotas = fill(shares, total, cap)
    # A head without a block sees the recent tokens alone.
    floor = 1 if total >= len(shares) else 0
    return tuple(share_out(quotas, total, floor=floor, cap=cap))
