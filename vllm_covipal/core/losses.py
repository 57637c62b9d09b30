"""Stage 2's budget terms: what retaining more than the budget costs.

Without one the best retention is 1 everywhere. The paper's own form is not known.
"""

from typing import Literal, get_args

from torch import Tensor

BudgetKind = Literal["squared", "absolute", "one_sided", "none"]


def budget_loss(retention: Tensor, keep_ratio: float, kind: BudgetKind) -> Tensor:
    """Cost of one item's retention.

    Args:
        retention: shares of the candidates, [C], range (0, 1).
        keep_ratio: the mean that is asked for, (0, 1].
        kind: ``squared``, (mean - r) ** 2; ``absolute``, |mean - r|; ``one_sided``, as squared,
            but less than r costs nothing; ``none``, 0.

    Returns:
        A scalar.
    """
    excess = retention.mean() - keep_ratio
    if kind == "squared":
        return excess.square()
    if kind == "absolute":
        return excess.abs()
    if kind == "one_sided":
        return excess.clamp(min=0).square()
    if kind == "none":
        return excess * 0
    raise ValueError(f"budget must be one of {', '.join(get_args(BudgetKind))}, got {kind!r}")
