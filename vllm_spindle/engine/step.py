"""One engine step seen by the reduction: which rows are reduced, and which prompts end in it.

Integers only, computed from what the scheduler sent; the same on every rank.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_spindle.core.budget import BandPlan
from vllm_spindle.core.transfer import to_device


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
    """A prompt that some band reduces after this step: its last token, or the last token of its
    answer that was to be waited for, is in it."""

    request_id: str
    prompt_len: int
    plans: tuple[BandPlan, ...]


@dataclass(frozen=True, eq=False)
class BandRows:
    """Block geometry of every row in one band; zeros where a row is not reduced. R rows.

    Compared by identity: steps with the same rows share one object, so that what follows from it
    is computed once.

    Attributes:
        prefix_blocks: first blocks that are held whole. [R], int64.
        first_block: first block of the reduced region. [R], int64.
        copy_blocks: blocks of one copy of the reduced region (``unfold`` has one copy per query
            head of a group, else there is one). [R], int64.
        tail_block: first block after the reduced region. [R], int64.
    """

    prefix_blocks: Tensor
    first_block: Tensor
    copy_blocks: Tensor
    tail_block: Tensor

    @classmethod
    def of(cls, plans: list[BandPlan | None], num_copies: int) -> "BandRows | None":
        """From each row's plan, None for a row that is whole; None if all are."""
        if not any(plans):
            return None
        rows = [
            (p.prefix_blocks, p.first_block, p.reduced_blocks // num_copies, p.tail_block)
            if p and p.is_reduced
            else (0, 0, 0, 0)
            for p in plans
        ]
        return cls(*torch.tensor(rows, dtype=torch.int64).unbind(1))

    def to(self, device: torch.device) -> "BandRows":
        """The same on a device, in one copy that nothing waits for."""
        if device.type == "cpu":
            return self
        host = torch.stack(
            (self.prefix_blocks, self.first_block, self.copy_blocks, self.tail_block)
        )
        return BandRows(*to_device(host, device).unbind(0))

    def source_columns(self, copy_idx: int, num_columns: int) -> Tensor:
        """Column of the natural table that each column of the shifted one is read from.

        Row [- - - R R T T], copy_blocks 2, tail_block 5 -> [3 4 5 6 6 6 6], and with a prefix of
        one block, [P - - R R T T] -> [0 3 4 5 6 6 6]: columns past the row's end are never read,
        they only must stay inside the table.

        Returns:
            [R, num_columns], int64.
        """
        column = torch.arange(num_columns, device=self.tail_block.device)
        prefix = self.prefix_blocks.unsqueeze(1)
        in_region = column < prefix + self.copy_blocks.unsqueeze(1)
        start = self.first_block - self.prefix_blocks + copy_idx * self.copy_blocks
        shift = torch.where(in_region, start.unsqueeze(1), self.skipped_blocks.unsqueeze(1))
        shift = torch.where(column < prefix, 0, shift)
        return (column + shift).clamp_(max=num_columns - 1)

    @property
    def skipped_blocks(self) -> Tensor:
        """Blocks by which a row is shorter than natural, seen from one copy. [R], int64."""
        return self.tail_block - self.prefix_blocks - self.copy_blocks


@dataclass(frozen=True, eq=False)
class HeadRows:
    """Block geometry of every row in a band whose kv heads hold different numbers of blocks.

    Zeros where a row is not reduced. Compared by identity, as ``BandRows``. R rows, K kv heads of
    this rank, Lb layers of the band.

    Attributes:
        prefix_blocks, first_block, tail_block: as in ``BandRows``. [R], int64; in buffers int32.
        head_blocks: pages of the region that each kv head of each layer holds. [Lb, K, R], also.
    """

    prefix_blocks: Tensor
    first_block: Tensor
    tail_block: Tensor
    head_blocks: Tensor

    @classmethod
    def of(
        cls,
        plans: list[BandPlan | None],
        head_blocks: Callable[[BandPlan], list[tuple[int, ...]]],
    ) -> "HeadRows | None":
        """From each row's plan, None for a row that is whole; None if all are.

        Args:
            plans: R plans.
            head_blocks: pages of each kv head of each layer of a plan, [Lb][K].
        """
        reduced = [plan if plan and plan.is_reduced else None for plan in plans]
        different = dict.fromkeys(plan for plan in reduced if plan)  # rows often have the same
        counts = {plan: torch.tensor(head_blocks(plan)) for plan in different}
        if not counts:
            return None
        none = torch.zeros_like(next(iter(counts.values())))
        starts = [
            (p.prefix_blocks, p.first_block, p.tail_block) if p else (0,) * 3 for p in reduced
        ]
        return cls(
            *torch.tensor(starts, dtype=torch.int64).unbind(1),
            torch.stack([counts[p] if p else none for p in reduced], dim=-1),
        )

    def skipped_blocks(self, layer: int) -> Tensor:
        """Blocks by which each kv head's row is shorter than natural. [K, R], int64."""
        return self.tail_block - self.prefix_blocks - self.head_blocks[layer]

    def source_pages(self, layer: int, num_columns: int) -> tuple[Tensor, Tensor]:
        """Column of the natural table, and page in its block, of each column of a kv head's row.

        A region of two blocks of two kv heads, of which head 0 has three pages:
        [- R R T] -> head 0: [1.0 1.1 2.0 3.0], head 1: [2.1 3.1 ...]. Columns past the row's end
        are never read, they only must stay inside the table.

        No shape depends on what the rows are, so that a captured graph may do it.

        Returns:
            Both [K, R, num_columns], of the rows' own type.
        """
        held = self.head_blocks[layer].unsqueeze(2)  # [K, R, 1]
        num_heads = held.shape[0]
        before = held.cumsum(0, dtype=held.dtype) - held
        prefix = self.prefix_blocks.unsqueeze(1)  # [R, 1]
        column = torch.arange(num_columns, dtype=held.dtype, device=held.device)
        own = torch.arange(num_heads, dtype=held.dtype, device=held.device).view(-1, 1, 1)
        page = before + column - prefix
        in_region = (column >= prefix) & (column < prefix + held)
        shifted = column + self.skipped_blocks(layer).unsqueeze(2)
        source = torch.where(column < prefix, column, shifted)
        region = self.first_block.unsqueeze(1) + page.div(num_heads, rounding_mode="floor")
        source = torch.where(in_region, region, source)
        slots = torch.where(in_region, page % num_heads, own)
        return source.clamp_(0, num_columns - 1), slots


@dataclass(frozen=True, eq=False)
class CodebookRows:
    """Reduced rows of a band with codebooks, r of them, for the compiled kernel.

    Attributes:
        rows: which rows of the step. [r], int64.
        starts: first block of the region, and of the tail. [r, 2], int32.
        prefix_blocks: first blocks that are held whole. [r], int32.
        shapes: key entries, value entries, tokens. [r, 3], int32.
    """

    rows: Tensor
    starts: Tensor
    prefix_blocks: Tensor
    shapes: Tensor


@dataclass(frozen=True)
class WindowRows:
    """Which tokens of the step are window queries, n of them, and whose.

    Attributes:
        source: tokens of the step, request by request, oldest first. [n], int64.
        counts: request and number of tokens, in the same order.
    """

    source: Tensor
    counts: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Step:
    """Everything that the builders, the implementation and the reduction ask about a step.

    Attributes:
        bands: per band, or None where no row is reduced. In a band with codebooks, reduced rows
            show their tail alone: the stock kernel cannot read the region.
        codebooks: per band, None where no row has codebooks.
        heads: per band, None unless its kv heads hold different numbers of blocks.
        window: None if the step holds no window query.
        prompt_ends: prompts to reduce after the forward.
    """

    bands: tuple[BandRows | None, ...]
    codebooks: tuple[CodebookRows | None, ...]
    heads: tuple[HeadRows | None, ...]
    window: WindowRows | None
    prompt_ends: tuple[PromptEnd, ...]

    @classmethod
    def idle(cls, num_bands: int) -> "Step":
        """A step in which nothing is reduced, nor is going to be."""
        nothing = (None,) * num_bands
        return cls(nothing, nothing, nothing, None, ())
