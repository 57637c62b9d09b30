"""Ends a run whose loss or gradient is no number, before a checkpoint holds such weights."""

import math

from torch import Tensor

MAX_SKIPPED = 30
"""Steps in a row that a gradient scaler may leave out: from a scale of 2 ** 16 to far below 1."""


class DivergenceCheck:
    """Looks at every step of a stage before the optimizer takes it."""

    def __init__(self, stage: int, *, has_scaler: bool) -> None:
        """Args: stage: 1 or 2. has_scaler: such a step is left out, and the scale made smaller."""
        self._stage = stage
        self._max_skipped = MAX_SKIPPED if has_scaler else 0
        self._num_skipped = 0

    def look(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """One step's loss and the length of its gradient.

        Raises:
            RuntimeError: if they are not finite, and that is not the scaler's to mend.
        """
        values = float(loss.detach()), float(norm)
        self._num_skipped = 0 if all(map(math.isfinite, values)) else self._num_skipped + 1
        if self._num_skipped > self._max_skipped:
            raise RuntimeError(
                f"stage {self._stage}, step {step}: the loss is {values[0]:g}, its gradient "
                f"{values[1]:g} long; start again (--restart, or another out) with a lower "
                f"stage{self._stage}.learning_rate, or another dtype or mixed_precision"
            )
