"""One engine step seen by the reduction: which rows are reduced, and which prompts end in it.

Integers only, computed from what the scheduler sent; the same on every rank.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_spindle.core.budget import BandPlan


@dataclass(frozen=True)
class BatchView:
    """The rows of a step, in the order of the worker's batch. R rows.

    Attributes:
        request_ids: R ids.
        prompt_lens: prompt tokens of each. [R].
        num_computed: tokens in the cache before the step. [R].
        num_scheduled: tokens of the step. [R].
    """

    request_ids: list[str]
    prompt_lens: np.ndarray
    num_computed: np.ndarray
    num_scheduled: np.ndarray


@dataclass(frozen=True)
class PromptEnd:
    """A prompt whose last token is in this step, and which some band reduces after it."""

    row: int
    request_id: str
    prompt_len: int
    plans: tuple[BandPlan, ...]
    slot: int


@dataclass(frozen=True)
class BandRows:
    """Block geometry of every row in one band; zeros where a row is not reduced. [R] each.

    Attributes:
        first_block: first held block.
        copy_blocks: blocks of one copy of the reduced region (``unfold`` has one copy per query
            head of a group, else there is one).
        tail_block: first block after the reduced region.
    """

    first_block: Tensor
    copy_blocks: Tensor
    tail_block: Tensor

    @classmethod
    def of(cls, plans: list[BandPlan | None], num_copies: int) -> "BandRows | None":
        """From each row's plan, None for a row that is whole; None if all are."""
        if not any(plans):
            return None
        rows = [
            (p.first_block, p.reduced_blocks // num_copies, p.tail_block) if p else (0, 0, 0)
            for p in plans
        ]
        return cls(*torch.tensor(rows, dtype=torch.int64).unbind(1))


@dataclass(frozen=True)
class WindowRows:
    """Which tokens of the step are window queries, and where the stash keeps them. int64."""

    source: Tensor
    target: Tensor


@dataclass(frozen=True)
class Step:
    """Everything that the builders, the implementation and the reduction ask about a step.

    Attributes:
        bands: per band, or None where no row is reduced.
        window: None if the step holds no window query.
        prompt_ends: prompts to reduce after the forward.
    """

    bands: tuple[BandRows | None, ...]
    window: WindowRows | None
    prompt_ends: tuple[PromptEnd, ...]
