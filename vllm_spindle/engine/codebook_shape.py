"""How a region's bytes are shared between codes and entries: integers, known before the data."""

from vllm_spindle.config import SpindleConfig
from vllm_spindle.core.budget import BandPlan
from vllm_spindle.kernels.region_shape import (
    ARRAY_ELEMENTS,
    MAX_ENTRIES,
    RegionShape,
    entry_capacity,
)

# Codes may take at most this share of a region: a codebook of a handful of entries says nothing.
MAX_CODE_SHARE = 3 / 4


def codebook_shape(
    config: SpindleConfig, method: str, plan: BandPlan, block_size: int, head_size: int
) -> RegionShape:
    """Most tokens, and entries, of a band's region, per kv head.

    ``merge`` has codes for the whole context, ``both`` for ``merge_factor`` tokens in the space of
    one; either for fewer where codes would leave too little room for entries. How many tokens find
    an entry is up to them: codes may be left over.

    Args:
        config: the dials.
        method: ``merge`` or ``both``.
        plan: the band's plan of the prompt; its reduced region is what there is.
        block_size: tokens per block.
        head_size: elements of a key.
    """
    rows = 2 * block_size * plan.reduced_blocks
    context = plan.context_blocks * block_size
    wanted = context
    if method == "both":
        wanted = min(context, int(config.merge_factor * plan.reduced_blocks * block_size))
    most = int(rows * MAX_CODE_SHARE * head_size) // sum(ARRAY_ELEMENTS)
    # Each array starts on a row of its own: leave room for one part-filled row each.
    num_tokens = max(0, min(wanted, most - head_size))
    if num_tokens == 0:
        return RegionShape(0, 0, 0, block_size, head_size)
    entries = entry_capacity(plan.reduced_blocks, block_size, head_size, num_tokens)
    most_entries = min(num_tokens, MAX_ENTRIES)
    key_entries = min(most_entries, max(1, int(entries * config.key_share)))
    value_entries = min(most_entries, max(1, entries - key_entries))
    # What values cannot use goes to keys: one entry a token is exact already.
    key_entries = min(most_entries, entries - value_entries)
    return RegionShape(key_entries, value_entries, num_tokens, block_size, head_size)
