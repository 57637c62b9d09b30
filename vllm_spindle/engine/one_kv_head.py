"""A stock metadata builder as it would be in a model of one kv head a layer.

Where a batch has a row for each kv head, the kernel sees one kv head and G query heads in K times
the rows. Builders of vLLM count heads and rows to plan, and to choose among kernels.
"""

import copy
from typing import Any

HEADS = (("num_heads", "num_kv_heads"), ("num_heads_q", "num_heads_kv"))  # CPU; Triton, Flash
# Triton's: up to how many rows it splits a row's tokens, so that there are programs enough.
ROWS = ("seq_threshold_3D", "max_seqs_64_segments")
# And what the splits are written to: [tokens, heads, ...], K times the tokens of heads / K.
SCRATCH = ("softmax_segm_output", "softmax_segm_max", "softmax_segm_expsum")


def for_one_kv_head(builder: Any, num_kv_heads: int) -> Any:
    """A copy of the builder that shares its memory.

    Args:
        builder: any of the stock backends'.
        num_kv_heads: of this rank (K).
    """
    single = copy.copy(builder)
    for queries, kv in HEADS:
        if hasattr(builder, queries):
            group = getattr(builder, queries) // num_kv_heads
            setattr(single, queries, group)
            setattr(single, kv, 1)
    for name in ROWS:
        if hasattr(builder, name):
            setattr(single, name, getattr(builder, name) * num_kv_heads)
    for name in SCRATCH:
        if hasattr(builder, name):
            scratch = getattr(builder, name)
            tokens, heads = scratch.shape[:2]
            shape = (tokens * num_kv_heads, heads // num_kv_heads, *scratch.shape[2:])
            setattr(single, name, scratch.view(shape))
    return single
