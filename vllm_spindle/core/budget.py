"""How much of a prompt each band keeps: integer arithmetic, known before the data.

The scheduler and the worker both call ``plan_prompt`` with the same arguments and so agree
without a message between them; ratios are rounded to counts here and nowhere else. No torch.

A request's row of blocks in one band, after the reduction (P prompt tokens, r recent ones, bs
block size, natural indexing, never shortened):

    [0 .. prefix_blocks)            the protected prefix, whole; most often there is none
    [prefix_blocks .. first_block)  freed
    [first_block .. tail_block)     the reduced region: kept context tokens
    [tail_block .. )                the recent tokens and what is generated, untouched

with tail_block = (P - r) // bs. The budget counts whole blocks, padding included; a protected
prefix is kept on top of it, and the rest of the prompt is what the keep ratio speaks of.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from vllm_spindle.core.bands import band_ratios, pyramid_ratios
from vllm_spindle.core.budget_sharing import share_out
from vllm_spindle.core.observers import first_observed
from vllm_spindle.core.profile import Profile, shares_at

BudgetShape = Literal["pyramid", "uniform", "measured"]


@dataclass(frozen=True, slots=True)
class BandPlan:
    """What one band holds of one prompt once it is reduced. Counts of blocks.

    ``observed_from`` counts tokens, and is the same in every band: the request computes the
    queries of the tokens from there on by itself, for its scores (``core/observers.py``).
    ``context_share`` is the share of the context that all bands together keep: what measured
    budgets are looked up by (``core/profile.py``).
    """

    first_block: int
    tail_block: int
    prompt_blocks: int
    prefix_blocks: int = 0
    observed_from: int = 0
    context_share: Fraction = Fraction(0)

    @property
    def context_blocks(self) -> int:
        """Blocks whose tokens may be evicted."""
        return self.tail_block - self.prefix_blocks

    @property
    def reduced_blocks(self) -> int:
        """Blocks of the reduced region."""
        return self.tail_block - self.first_block

    @property
    def freed_blocks(self) -> int:
        """Blocks that go back to the pool."""
        return self.first_block - self.prefix_blocks

    @property
    def held_blocks(self) -> int:
        """Blocks that hold the prompt after the reduction."""
        return self.prompt_blocks - self.freed_blocks

    @property
    def is_reduced(self) -> bool:
        """False where the band keeps the whole prompt: nothing is moved, nothing is freed."""
        return self.freed_blocks > 0


def shareable_blocks(
    plans: Sequence[BandPlan], prompt_len: int, block_size: int
) -> tuple[int | None, ...]:
    """Blocks from the row's start that the prefix cache may know, per band; None for all.

    Reduced content must never be found under a prompt's hash, and a block that is shared must
    never be written: so a reduced band shares what lies before its region. Its observers' queries
    must be computed: so it shares nothing from them on. Where another band is reduced, a whole one
    shares its prompt alone: what is generated saw reduced layers.
    """
    if not any(plan.is_reduced for plan in plans):
        return (None,) * len(plans)
    return tuple(
        min(plan.first_block, plan.observed_from // block_size)
        if plan.is_reduced
        else prompt_len // block_size
        for plan in plans
    )


def num_blocks(num_tokens: int, block_size: int) -> int:
    """Blocks that hold ``num_tokens``, the last one perhaps in part."""
    return -(-num_tokens // block_size)


def plan_prompt(
    prompt_len: int,
    *,
    keep_ratio: Fraction,
    recent: int,
    block_size: int,
    bands: Sequence[range],
    beta: Fraction,
    shape: BudgetShape = "pyramid",
    profile: Profile | None = None,
    unit_blocks: int = 1,
    min_prompt_len: int = 0,
    protected_tokens: int = 0,
    window: int = 1,
    observers: int = 0,
) -> tuple[BandPlan, ...]:
    """The plan of one prompt, one entry per band.

    ``keep_ratio`` of the tokens after the protected prefix, over all layers, is rounded down to
    whole blocks; the recent tokens' blocks come first, the rest is the reduced region, shared out
    along the pyramid. The recent tokens are kept even where they alone exceed the budget.

    Args:
        prompt_len: prompt tokens (P), at least 1.
        keep_ratio: share of the KV bytes after the protected prefix to keep over all bands, (0, 1].
        recent: last prompt tokens, always kept.
        block_size: tokens per block.
        bands: layers of each band, shallow to deep.
        beta: pyramid floor (see ``pyramid_ratios``).
        shape: ``pyramid``, ``uniform`` for the same share in every band, or ``measured``.
        profile: what was measured.
        unit_blocks: region sizes are multiples of this (``gqa: unfold`` needs one block per
            query head of a group).
        min_prompt_len: what is shorter, the protected prefix apart, is kept whole.
        protected_tokens: first tokens that every band keeps; only their whole blocks are.
        window: last prompt tokens that score (l_w).
        observers: most tokens before the window that score too.
    """
    prompt_blocks = num_blocks(prompt_len, block_size)
    tail_block = max(0, (prompt_len - recent) // block_size)
    tail_blocks = prompt_blocks - tail_block
    prefix_blocks = min(protected_tokens // block_size, tail_block)
    rest_len = prompt_len - prefix_blocks * block_size
    if keep_ratio >= 1 or tail_block == prefix_blocks or rest_len < min_prompt_len:
        return (BandPlan(0, tail_block, prompt_blocks),) * len(bands)

    # A block costs the layers of the longest band, in every band: shorter groups are padded.
    num_layers = sum(len(band) for band in bands)
    longest = max(len(band) for band in bands)
    total_blocks = int(keep_ratio * rest_len * num_layers / (block_size * longest))
    cap = (tail_block - prefix_blocks) // unit_blocks
    budget = max(0, total_blocks - tail_blocks * len(bands)) // unit_blocks
    budget = min(budget, cap * len(bands))
    context_ratio = Fraction(budget, cap * len(bands)) if cap else Fraction(0)
    ratios = [context_ratio] * len(bands)
    if shape == "pyramid":
        ratios = band_ratios(pyramid_ratios(num_layers, context_ratio, beta), bands)
    elif shape == "measured":
        assert profile is not None
        shares_of_heads = shares_at(profile, context_ratio)
        layers = [sum(heads, Fraction(0)) / len(heads) for heads in shares_of_heads]
        ratios = band_ratios(layers, bands)
    # A band left with recent tokens alone can no longer see the context: each gets a unit first.
    floor = 1 if budget >= len(bands) else 0
    shares = share_out([r * cap for r in ratios], budget, floor=floor, cap=cap)
    first_blocks = [tail_block - share * unit_blocks for share in shares]
    observed_from = first_observed(
        prompt_len,
        window=window,
        observers=observers,
        prefix_tokens=prefix_blocks * block_size,
        shared_tokens=min(first_blocks) * block_size,
    )
    return tuple(
        BandPlan(
            first_block, tail_block, prompt_blocks, prefix_blocks, observed_from, context_ratio
        )
        for first_block in first_blocks
    )
