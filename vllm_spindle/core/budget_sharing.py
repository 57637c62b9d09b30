"""Integers and fractions that share out a total, exactly. No torch."""

from collections.abc import Sequence
from fractions import Fraction


def share_out(quotas: Sequence[Fraction], total: int, *, floor: int, cap: int) -> list[int]:
    """Integers that sum to ``total``, each as near to its quota as that allows.

    Largest remainder, ties to the earlier (shallower) entry; every share lies in
    ``[floor, cap]``.

    Raises:
        ValueError: if ``total`` cannot be met within the bounds.
    """
    if not floor * len(quotas) <= total <= cap * len(quotas):
        raise ValueError(f"cannot share {total} among {len(quotas)} within [{floor}, {cap}]")
    shares = [min(max(int(quota), floor), cap) for quota in quotas]
    by_shortfall = sorted(range(len(quotas)), key=lambda i: (shares[i] - quotas[i], i))
    step = 1 if sum(shares) < total else -1
    order = by_shortfall if step == 1 else by_shortfall[::-1]
    while sum(shares) != total:
        for i in order:
            if sum(shares) != total and floor <= shares[i] + step <= cap:
                shares[i] += step
    return shares


def fill(weights: Sequence[Fraction], total: int, cap: int) -> list[Fraction]:
    """``total`` by weight, none above ``cap``: what one cannot hold goes to the others."""
    left, unfilled = Fraction(total), dict(enumerate(weights))
    quotas = [Fraction(0)] * len(weights)
    while unfilled and left > 0:
        weight = sum(unfilled.values(), Fraction(0))
        alike = left / len(unfilled)
        due = {i: left * w / weight if weight else alike for i, w in unfilled.items()}
        full = [i for i in unfilled if due[i] >= cap]
        for i in full or due:
            quotas[i] = min(due[i], Fraction(cap))
        if not full:
            break
        left -= cap * len(full)
        unfilled = {i: w for i, w in unfilled.items() if i not in full}
    return quotas
