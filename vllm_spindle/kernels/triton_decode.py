"""Decode attention over codebook regions and their dense tails, in Triton for CUDA.

One program: the query heads of one kv head, for a few query tokens of one row, over one split of
what they see; merged tokens first, then the dense ones, prefix and tail. ``merge_splits`` adds the
splits up by their log-sum-exp. ``device_decode`` launches both.

Shapes: B rows, Q query tokens of all rows, K kv heads, G query heads per kv head, n tokens per
block, D head size, P rows of the rotary table, W columns of the block table, S splits. In a
program: M query rows (query tokens times G, padded), T tokens of a tile. Method: SpindleKV sec.
3.3 (arXiv:2507.06517). Slow twin: ``core.reference.attend_codebook``; CPU twin: ``numba_decode``.

Cache: vLLM's logical [blocks, K, n, 2 * D], where the last axis is a token's key, then its value
(FlashAttention, Triton and FlashInfer backends of vLLM 0.32, model runners V1 and V2). The strides
of the other axes are free, so both of vLLM's physical orders will do, heads or tokens outermost in
a block. A region fills its chunks in logical order: row r of a head's chunk is the key (r even) or
value (r odd) half of slot r // 2. Codebook entries are bf16 in a float16 cache too.

All products are of float32 operands at tf32, in which bf16 and float16 are exact: rotated entries
and probabilities keep 11 bits. Triton's interpreter rounds nothing there, and multiplies the bits
of bf16 operands (3.9), which is one reason not to have any.

Never timed, nor run on a GPU: it was written without one. Triton 3.9 compiles it for sm_80 and
sm_90; at D = 128, T = 64 with 178 registers, 62 KB of shared memory and no spills: two programs
per multiprocessor. A session with a GPU should try, in this order: T of 32, 64, 128 and num_warps
4, 8; two or four programs per multiprocessor (``device_decode``); tail products in the cache's own
type, half the shared memory; runs of equal key codes, of which a tile now gathers the entry once a
token, from the first-level cache; ``tl.range(..., num_stages=...)`` on both loops; adding the
weights onto the value entries before the product, as on the CPU, where tokens share few of them.
"""

import triton
import triton.language as tl

from vllm_spindle.kernels import decode_rows, region_shape

LOWEST = tl.constexpr(-1e30)  # finite: what nothing was seen of must not give inf - inf
POSITION_BITS = tl.constexpr(region_shape.POSITION_BITS)
EMPTY = tl.constexpr(region_shape.EMPTY)
NOT_MINE = tl.constexpr(decode_rows.NOT_MINE)
LN_2 = tl.constexpr(0.6931471805599453)

# They differ from step to step: a kernel must not be compiled for some of their values.
CHANGING = (
    "num_query_blocks",
    "num_rows",
    "num_splits",
    "stride_table",
    "stride_output_split",
    "stride_lse_split",
    "stride_lse_head",
    "stride_split_output",
    "stride_split_lse",
    "stride_split_lse_head",
)


@triton.jit
def _in_run(
    elements, seen, head_ptr, table_ptr, stride_block, stride_slot,
    N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Pointers to elements of a region's run, in whatever blocks its chunks lie."""
    inside = elements % (2 * N * D)
    block = tl.load(table_ptr + elements // (2 * N * D), mask=seen, other=0).to(tl.int64)
    return head_ptr + block * stride_block + inside // (2 * D) * stride_slot + inside % (2 * D)


@triton.jit
def _load_16(pointers, seen, dtype: tl.constexpr):
    """16-bit floats as float32; 0 where not seen."""
    return tl.load(pointers, mask=seen, other=0).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _load_merged(
    tokens, seen, shape_ptr, head_ptr, table_ptr, cos_sin_ptr,
    stride_block, stride_slot, stride_cos_sin,
    N: tl.constexpr, D: tl.constexpr, HALF_PAD: tl.constexpr, HEAD_PAD: tl.constexpr,
):  # fmt: skip
    """A tile of merged tokens: directions of keys, rotated, and of values, and their lengths.

    Args:
        tokens: [T].
        shape_ptr: key entries, value entries, tokens of the region.
        head_ptr: the kv head in block 0.
        table_ptr: the region's first column of the block table.

    Returns:
        Both halves of the keys, [T, HALF_PAD] each, values [T, HEAD_PAD], key and value norms [T],
        and which slots hold a token [T].
    """
    num_key_entries = tl.load(shape_ptr)
    # Per-token arrays, each starting on a row: see ``region_shape``.
    array_size = tl.cdiv(tl.load(shape_ptr + 2), D) * D
    first = (num_key_entries + tl.load(shape_ptr + 1)) * D
    at = _in_run(first + tokens, seen, head_ptr, table_ptr, stride_block, stride_slot, N, D)
    key_codes = tl.load(at, mask=seen, other=0).to(tl.int32) & 0xFFFF
    first += array_size
    at = _in_run(first + tokens, seen, head_ptr, table_ptr, stride_block, stride_slot, N, D)
    value_codes = tl.load(at, mask=seen, other=0).to(tl.int32) & 0xFFFF
    first += array_size
    at = _in_run(first + tokens, seen, head_ptr, table_ptr, stride_block, stride_slot, N, D)
    key_norms = _load_16(at, seen, tl.float16)
    first += array_size
    at = _in_run(first + tokens, seen, head_ptr, table_ptr, stride_block, stride_slot, N, D)
    value_norms = _load_16(at, seen, tl.float16)
    first += array_size
    # Two elements, the lower bits first: on one row, which has an even number of them.
    at = _in_run(first + 2 * tokens, seen, head_ptr, table_ptr, stride_block, stride_slot, N, D)
    low = tl.load(at, mask=seen, other=0).to(tl.int32)
    high = tl.load(at + 1, mask=seen, other=EMPTY).to(tl.int32)
    seen = seen & (high != EMPTY)
    positions = tl.where(seen, (high << POSITION_BITS) + low, 0)

    half_dims = tl.arange(0, HALF_PAD)
    in_half = seen[:, None] & (half_dims < D // 2)[None, :]
    at = _in_run(key_codes * D, seen, head_ptr, table_ptr, stride_block, stride_slot, N, D)
    at = at[:, None] + 2 * half_dims[None, :]
    one = _load_16(at, in_half, tl.bfloat16)
    other = _load_16(at + 1, in_half, tl.bfloat16)
    at = cos_sin_ptr + positions.to(tl.int64)[:, None] * stride_cos_sin + half_dims[None, :]
    cos = tl.load(at, mask=in_half, other=0).to(tl.float32)
    sin = tl.load(at + D // 2, mask=in_half, other=0).to(tl.float32)

    dims = tl.arange(0, HEAD_PAD)
    in_head = seen[:, None] & (dims < D)[None, :]
    rows = num_key_entries + value_codes
    at = _in_run(rows * D, seen, head_ptr, table_ptr, stride_block, stride_slot, N, D)
    values = _load_16(at[:, None] + dims[None, :], in_head, tl.bfloat16)
    return one * cos - other * sin, other * cos + one * sin, values, key_norms, value_norms, seen


@triton.jit
def _load_dense(
    tokens, seen, head_ptr, table_ptr, prefix_blocks, tail_start, stride_block, stride_slot,
    dtype: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, HALF_PAD: tl.constexpr, HEAD_PAD: tl.constexpr,
):  # fmt: skip
    """A tile of dense tokens: both halves of the keys, [T, HALF_PAD] each, values [T, HEAD_PAD].

    Args:
        tokens: of the prefix and, from its end on, of the tail. [T].
        table_ptr: the row's first column of the block table.
        prefix_blocks: columns of the prefix.
        tail_start: first column of the tail.
    """
    column = tokens // N
    column += tl.where(column < prefix_blocks, 0, tail_start - prefix_blocks)
    block = tl.load(table_ptr + column, mask=seen, other=0).to(tl.int64)
    at = (head_ptr + block * stride_block + tokens % N * stride_slot)[:, None]
    half_dims = tl.arange(0, HALF_PAD)[None, :]
    in_half = seen[:, None] & (half_dims < D // 2)
    one = _load_16(at + half_dims, in_half, dtype)
    other = _load_16(at + D // 2 + half_dims, in_half, dtype)
    dims = tl.arange(0, HEAD_PAD)[None, :]
    values = _load_16(at + D + dims, seen[:, None] & (dims < D), dtype)
    return one, other, values


@triton.jit
def _products(query_one, query_other, one, other):
    """[M, T]."""
    products = tl.dot(query_one, tl.trans(one), input_precision="tf32")
    return tl.dot(query_other, tl.trans(other), acc=products, input_precision="tf32")


@triton.jit
def _softmax_step(products, value_scales, values, peaks, totals, sums):
    """One step of the online softmax. products: log2, -inf where not seen. [M, T]."""
    new_peaks = tl.maximum(peaks, tl.max(products, axis=1))
    factors = tl.exp2(peaks - new_peaks)
    weights = tl.exp2(products - new_peaks[:, None])
    totals = totals * factors + tl.sum(weights, axis=1)
    sums = tl.dot(
        weights * value_scales, values, acc=sums * factors[:, None], input_precision="tf32"
    )
    return new_peaks, totals, sums


@triton.jit(
    do_not_specialize=CHANGING,
    do_not_specialize_on_alignment=(
        "table_ptr", "starts_ptr", "shapes_ptr", "tail_lens_ptr", "query_start_ptr",
        "prefix_blocks_ptr",
    ),
)  # fmt: skip
def decode_split(
    query_ptr, output_ptr, lse_ptr, cache_ptr, cos_sin_ptr,
    table_ptr, starts_ptr, shapes_ptr, tail_lens_ptr, query_start_ptr, prefix_blocks_ptr,
    scale_log2, num_query_blocks,
    stride_query_token, stride_query_head,
    stride_output_split, stride_output_token, stride_output_head,
    stride_lse_split, stride_lse_head,
    stride_block, stride_head, stride_slot, stride_cos_sin, stride_table,
    GROUP: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    HALF_PAD: tl.constexpr, HEAD_PAD: tl.constexpr,
    NUM_QUERY_ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Attention over one split, normalised, and its log-sum-exp. Grid: row and queries, K, S.

    Of a row that is left alone (NOT_MINE) nothing is read or written.

    Args:
        query_ptr: [Q, K * G, D].
        output_ptr: [S, Q, K * G, D]; zero for a split in which nothing is seen.
        lse_ptr: natural logarithm; -inf for such a split. [S, K * G, Q].
        cache_ptr: [blocks, K, n, 2 * D], as int16.
        cos_sin_ptr: [P, D].
        table_ptr: and the other arrays of the step, int32: see ``decode_rows.DeviceRows``.
        scale_log2: softmax scale times log2 of e.
        num_query_blocks: programs per row, NUM_QUERY_ROWS // GROUP query tokens each.
    """
    row = tl.program_id(0) // num_query_blocks
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    query_first = tl.load(query_start_ptr + row)
    query_len = tl.load(query_start_ptr + row + 1) - query_first
    first_token = tl.program_id(0) % num_query_blocks * (NUM_QUERY_ROWS // GROUP)
    num_merged = tl.load(shapes_ptr + row * 3 + 2)
    if first_token >= query_len or num_merged == NOT_MINE:
        return

    lane = tl.arange(0, NUM_QUERY_ROWS)
    token = first_token + lane // GROUP
    is_query = (lane < NUM_QUERY_ROWS // GROUP * GROUP) & (token < query_len)
    head = kv_head * GROUP + lane % GROUP
    at = (query_first + token).to(tl.int64)
    half_dims = tl.arange(0, HALF_PAD)
    in_half = is_query[:, None] & (half_dims < D // 2)[None, :]
    pointers = query_ptr + (at * stride_query_token + head * stride_query_head)[:, None]
    pointers += half_dims[None, :]
    query_one = tl.load(pointers, mask=in_half, other=0).to(tl.float32)
    query_other = tl.load(pointers + D // 2, mask=in_half, other=0).to(tl.float32)

    # The query tokens are the last of the tail: each sees it, and the prefix, up to itself.
    prefix_blocks = tl.load(prefix_blocks_ptr + row)
    num_before = prefix_blocks * N + tl.load(tail_lens_ptr + row) - query_len
    last_token = tl.minimum(first_token + NUM_QUERY_ROWS // GROUP, query_len)
    num_dense = tl.maximum(num_before + last_token, 0)
    merged_tiles = tl.cdiv(num_merged, TILE)
    num_tiles = merged_tiles + tl.cdiv(num_dense, TILE)
    tiles_per_split = tl.cdiv(num_tiles, tl.num_programs(2))
    first_tile = tl.minimum(split * tiles_per_split, num_tiles)
    last_tile = tl.minimum(first_tile + tiles_per_split, num_tiles)

    head_ptr = cache_ptr + kv_head.to(tl.int64) * stride_head
    table_ptr += row.to(tl.int64) * stride_table
    region_ptr = table_ptr + tl.load(starts_ptr + row * 2)
    tail_start = tl.load(starts_ptr + row * 2 + 1)
    peaks = tl.full([NUM_QUERY_ROWS], LOWEST, tl.float32)
    totals = tl.zeros([NUM_QUERY_ROWS], tl.float32)
    sums = tl.zeros([NUM_QUERY_ROWS, HEAD_PAD], tl.float32)
    for tile in range(first_tile, tl.minimum(last_tile, merged_tiles)):
        tokens = tile * TILE + tl.arange(0, TILE)
        one, other, values, key_norms, value_norms, seen = _load_merged(
            tokens, tokens < num_merged, shapes_ptr + row * 3, head_ptr, region_ptr,
            cos_sin_ptr, stride_block, stride_slot, stride_cos_sin,
            N, D, HALF_PAD, HEAD_PAD,
        )  # fmt: skip
        products = _products(query_one, query_other, one, other)
        products *= (key_norms * scale_log2)[None, :]
        products = tl.where(seen[None, :], products, float("-inf"))
        peaks, totals, sums = _softmax_step(
            products, value_norms[None, :], values, peaks, totals, sums
        )
    for tile in range(tl.maximum(first_tile, merged_tiles), last_tile):
        tokens = (tile - merged_tiles) * TILE + tl.arange(0, TILE)
        one, other, values = _load_dense(
            tokens, tokens < num_dense, head_ptr, table_ptr, prefix_blocks, tail_start,
            stride_block, stride_slot, query_ptr.dtype.element_ty,
            N, D, HALF_PAD, HEAD_PAD,
        )  # fmt: skip
        products = _products(query_one, query_other, one, other) * scale_log2
        seen = tokens[None, :] <= (num_before + token)[:, None]
        products = tl.where(seen & (tokens < num_dense)[None, :], products, float("-inf"))
        peaks, totals, sums = _softmax_step(products, 1.0, values, peaks, totals, sums)

    seen_totals = tl.where(totals > 0, totals, 1.0)
    lse = tl.where(totals > 0, (peaks + tl.log2(seen_totals)) * LN_2, float("-inf"))
    tl.store(lse_ptr + split * stride_lse_split + head * stride_lse_head + at, lse, mask=is_query)
    sums /= seen_totals[:, None]
    dims = tl.arange(0, HEAD_PAD)
    at = split.to(tl.int64) * stride_output_split + at * stride_output_token
    pointers = output_ptr + (at + head * stride_output_head)[:, None] + dims[None, :]
    in_head = is_query[:, None] & (dims < D)[None, :]
    tl.store(pointers, sums.to(output_ptr.dtype.element_ty), mask=in_head)


@triton.jit(
    do_not_specialize=CHANGING,
    do_not_specialize_on_alignment=("query_start_ptr",),
)
def merge_splits(
    output_ptr, lse_ptr, split_output_ptr, split_lse_ptr, query_start_ptr, num_rows, num_splits,
    stride_output_token, stride_output_head, stride_lse_head,
    stride_split_output, stride_split_output_token, stride_split_output_head,
    stride_split_lse, stride_split_lse_head,
    D: tl.constexpr, HEAD_PAD: tl.constexpr,
):  # fmt: skip
    """Splits added up by their log-sum-exp. Grid: Q, query heads.

    Args:
        output_ptr: [Q, K * G, D].
        lse_ptr: [K * G, Q].
        split_output_ptr: [S, Q, K * G, D], float32.
        split_lse_ptr: +inf for tokens of rows that are left alone. [S, K * G, Q].
        query_start_ptr: [B + 1]; tokens after the last row's are padding and left alone.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    if token >= tl.load(query_start_ptr + num_rows):
        return
    dims = tl.arange(0, HEAD_PAD)
    in_head = dims < D
    split_lse_ptr += head * stride_split_lse_head + token
    split_output_ptr += token * stride_split_output_token + head * stride_split_output_head
    if tl.load(split_lse_ptr) == float("inf"):
        return
    peak = tl.full([], LOWEST, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    sums = tl.zeros([HEAD_PAD], tl.float32)
    for split in range(num_splits):
        lse = tl.load(split_lse_ptr + split * stride_split_lse)
        pointers = split_output_ptr + tl.cast(split, tl.int64) * stride_split_output + dims
        new_peak = tl.maximum(peak, lse)
        factor, weight = tl.exp(peak - new_peak), tl.exp(lse - new_peak)
        total = total * factor + weight
        sums = sums * factor + weight * tl.load(pointers, mask=in_head, other=0)
        peak = new_peak
    seen_total = tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, peak + tl.log(seen_total), float("-inf"))
    tl.store(lse_ptr + head * stride_lse_head + token, lse)
    sums /= seen_total
    pointers = output_ptr + token * stride_output_token + head * stride_output_head + dims
    tl.store(pointers, sums.to(output_ptr.dtype.element_ty), mask=in_head)
