"""Decode attention over codebook regions and the dense tokens around them, compiled for the CPU.

One pass with an online softmax over both parts. Slow twin: ``core.reference.attend_codebook``.

Shapes: B rows, K kv heads, G query heads per kv head, L query heads of one pass (lanes), D head
size, n tokens per block. Method: SpindleKV sec. 3.3 (arXiv:2507.06517). ``dims`` and ``lanes`` are
tuples whose lengths, D / 16 and L, become constants of the code.
"""

import zlib
from pathlib import Path

import numpy as np
from numba import prange

from vllm_spindle.kernels.decode_rows import NOT_MINE
from vllm_spindle.kernels.numba_cache import cached_njit
from vllm_spindle.kernels.numba_region import add_weighted_rows, attend_region
from vllm_spindle.kernels.numba_softmax import (
    FAST,
    LOWEST,
    from_bf16,
    inlined,
    scratch,
    softmax_step,
    to_bf16,
)
from vllm_spindle.kernels.numba_vector import dot_columns

GROUP = 16  # tail tokens per step: a vector of keys


@inlined
def attend_tail(dims, lanes, cache, bits, table, first_block, num_tokens, head, key_index,
                value_index, queries, scale, peaks, totals, factors, out):  # fmt: skip
    """Dense tokens of one kv head. The index tables are [n, D], or empty for the vec packing."""
    head_size, num_lanes = 16 * len(dims), len(lanes)
    chunk = cache.shape[2]
    block_size = chunk // (2 * head_size)
    stride = np.uint64(block_size)
    products = scratch((block_size + 32) * num_lanes)
    is_indexed = len(key_index) > 0
    unpacked = np.empty(chunk if is_indexed else 1, np.uint16)
    for start in range(0, num_tokens, block_size):
        count = min(block_size, num_tokens - start)
        block = table[first_block + start // block_size]
        key_at = (np.uint64(block) * np.uint64(cache.shape[1]) + np.uint64(head)) * np.uint64(chunk)
        source = bits
        if is_indexed:
            here = cache[block, head]
            for token in range(block_size):
                for dim in range(head_size):
                    unpacked[dim * block_size + token] = here[key_index[token, dim]]
                    place = (block_size + token) * head_size + dim
                    unpacked[place] = here[value_index[token, dim]]
            source, key_at = unpacked, np.uint64(0)
        for t in range(0, count, GROUP):
            at = np.uint64(t)
            dot_columns(
                dims, lanes, source, key_at + at, stride, queries, scale, products,
                at * np.uint64(num_lanes),
            )  # fmt: skip
        if softmax_step(lanes, products, count, peaks, totals, factors):
            for lane in range(num_lanes):
                for dim in range(head_size):
                    out[lane * head_size + dim] *= factors[lane]
        value_at = key_at + np.uint64(chunk // 2)
        add_weighted_rows(dims, lanes, source, value_at, count, products, np.uint64(0), out)


@inlined
def _attend_item(item, dims, lanes, query, output, cache, cos_sin, block_table, starts, shapes,
                 tail_lens, query_start, prefix_blocks, key_index, value_index, scale):  # fmt: skip
    """All queries of one row and kv head."""
    num_kv_heads = cache.shape[1]
    row, head = divmod(np.int64(item), num_kv_heads)  # prange counts in uint64
    if shapes[row, 2] == NOT_MINE:
        return
    head_size, num_lanes = 16 * len(dims), len(lanes)
    group = query.shape[1] // num_kv_heads
    bits = cache.reshape(-1)
    table = block_table[row]
    chunk = cache.shape[2]
    block_size = chunk // (2 * head_size)
    run = (table, starts[row, 0], num_kv_heads * chunk, head * chunk, chunk)
    peaks, totals = np.empty(num_lanes, np.float32), np.empty(num_lanes, np.float32)
    factors = np.empty(num_lanes, np.float32)
    queries = scratch(num_lanes * head_size)
    queries[:] = 0
    out = scratch(num_lanes * head_size)
    for token in range(query_start[row], query_start[row + 1]):
        num_seen = tail_lens[row] - (query_start[row + 1] - token) + 1
        for first in range(0, group, num_lanes):
            used = min(num_lanes, group - first)
            for lane in range(used):
                for dim in range(head_size):
                    queries[lane * head_size + dim] = from_bf16(
                        query[token, head * group + first + lane, dim]
                    )
            for lane in range(num_lanes):
                peaks[lane], totals[lane] = LOWEST, np.float32(0)
            for i in range(len(out)):
                out[i] = np.float32(0)
            if shapes[row, 2] > 0:
                attend_region(
                    dims, lanes, bits, run, shapes[row], cos_sin, queries, scale, peaks, totals,
                    factors, out,
                )  # fmt: skip
            for part in range(2):  # the prefix from column 0, the tail
                column, num_dense = starts[row, 1], num_seen
                if part == 0:
                    column, num_dense = np.int32(0), np.int64(prefix_blocks[row] * block_size)
                attend_tail(
                    dims, lanes, cache, bits, table, column, num_dense, head, key_index,
                    value_index, queries, scale, peaks, totals, factors, out,
                )  # fmt: skip
            for lane in range(used):
                share = np.float32(1) / totals[lane]
                for dim in range(head_size):
                    output[token, head * group + first + lane, dim] = to_bf16(
                        out[lane * head_size + dim] * share
                    )


def _outer(name: str, sources: int, **options):
    """A kernel over all items. Numba caches it by the time stamp of this file alone; ``sources``,
    a constant of the code, makes it compile again when another file of the kernel changes."""

    def attend(dims, lanes, query, output, cache, cos_sin, block_table, starts, shapes,
               tail_lens, query_start, prefix_blocks, key_index, value_index, scale):  # fmt: skip
        sources  # noqa: B018
        for item in prange(len(tail_lens) * cache.shape[1]):
            _attend_item(
                item, dims, lanes, query, output, cache, cos_sin, block_table, starts, shapes,
                tail_lens, query_start, prefix_blocks, key_index, value_index, scale,
            )  # fmt: skip

    attend.__name__ = attend.__qualname__ = name
    return cached_njit(fastmath=FAST, error_model="numpy", nogil=True, **options)(attend)


def _sources() -> int:
    """A number that changes with the files that the kernel is made of."""
    names = (
        "llvm_vectors",
        "numba_vector",
        "numba_softmax",
        "numba_region",
        "numba_decode",
        "region_shape",
        "decode_rows",
    )
    folder = Path(__file__).parent
    return zlib.crc32(b"".join((folder / f"{name}.py").read_bytes() for name in names))


# All rows and kv heads; see ``decode.RegionDecoder``. The parallel one uses numba's threads.
attend_serial = _outer("attend_serial", _sources())
attend_parallel = _outer("attend_parallel", _sources(), parallel=True)
