"""A stock metadata builder, or implementation, as it would be in a model of one kv head a layer.

Where a batch has a row for each kv head, the kernel sees one kv head and G query heads in K times
the rows. vLLM counts heads and rows to plan, to choose among kernels, and to shape what it hands
to them.
"""

import copy
from typing import Any

HEADS = (("num_heads", "num_kv_heads"), ("num_heads_q", "num_heads_kv"))  # CPU; Triton, Flash
# Triton's: up to how many rows it splits a row's tokens, so that there are programs enough. And
# FlashAttention's: up to how many tokens it is held to the splits that graphs have room for.
ROWS = ("seq_threshold_3D", "max_seqs_64_segments", "max_cudagraph_size")
# And what Triton's splits are written to: [tokens, heads, ...], K times the tokens of heads / K.
SCRATCH = ("softmax_segm_output", "softmax_segm_max", "softmax_segm_expsum")


def for_one_kv_head(stock: Any, num_kv_heads: int) -> Any:
    """A copy that shares its memory.

    Args:
        stock: builder or implementation of any of the stock backends.
        num_kv_heads: of this rank (K).
    """
    single = copy.copy(stock)
    for queries, kv in HEADS:
        if hasattr(stock, queries):
            group = getattr(stock, queries) // num_kv_heads
            setattr(single, queries, group)
            setattr(single, kv, 1)
    for name in ROWS:
        if getattr(stock, name, None) is not None:
            setattr(single, name, getattr(stock, name) * num_kv_heads)
    for name in SCRATCH:
        if hasattr(stock, name):
            scratch = getattr(stock, name)
            tokens, heads = scratch.shape[:2]
            shape = (tokens * num_kv_heads, heads // num_kv_heads, *scratch.shape[2:])
            setattr(single, name, scratch.view(shape))
    return single
