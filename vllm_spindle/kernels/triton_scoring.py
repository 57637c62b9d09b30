"""Attention that a prompt's tokens receive from its observed queries, in Triton for CUDA.

Two passes over the keys, which never hold a matrix of queries times tokens in memory.
``log_sum_exps`` finds each query's log-sum-exp by an online softmax, split over the tokens so that
few kv heads fill a device, too; ``merge_log_sum_exps`` adds the splits up. ``receive`` then goes
over the queries for each tile of tokens and puts their probabilities together, in all ways that
are asked at once. Keys are read where they lie, in the blocks of the cache. ``device_scoring``
launches. Slow twin, and what a CPU runs: ``core.scoring``.

Shapes: K kv heads, G query heads per kv head, Q observed queries, T tokens, D head size, n tokens
per block, S splits. In a program of the first pass: M query rows (query times G plus head), of the
second: M queries of one head; t tokens of a tile. Positions of the queries ascend: so those of a
tile are near one another, what comes after the last of them is not read, and queries that see
nothing of a tile of tokens are skipped.

bfloat16 and float16 are multiplied as they are, on tensor cores, and added up in float32: what
float32 operands would give; float32 as three tf32 products. Logarithms are of base 2.

Never timed, nor run on a GPU: it was written without one. Triton 3.9 compiles it for sm_80 and
sm_90; in bfloat16 at D = 128 the passes have 126 and 168 registers there, 66 and 82 KB of shared
memory and no spills: two programs per multiprocessor. A session with a GPU should try, in this
order: num_warps 4, 8; tiles of 128 by 128; a first loop without the mask, over what all queries of
a tile see.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # finite: what nothing was seen of must not give inf - inf
COUNTED = tl.constexpr(128)  # queries at a time where those before a tile are counted

# They differ from prompt to prompt: a kernel must not be compiled for some of their values.
CHANGING = (
    "num_queries",
    "num_tokens",
    "num_rows",
    "num_splits",
    "window_first",
    "window_stop",
    "last_first",
)


@triton.jit
def _load_keys(
    tokens, num_tokens, keys_ptr, table_ptr, stride_block, stride_slot,
    IS_PAGED: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD_PAD: tl.constexpr,
):  # fmt: skip
    """A tile of one kv head's keys, 0 beyond the last token. [t, HEAD_PAD]."""
    seen = tokens < num_tokens
    if IS_PAGED:
        block = tl.load(table_ptr + tokens // N, mask=seen, other=0).to(tl.int64)
        at = block * stride_block + tokens % N * stride_slot
    else:
        at = tokens.to(tl.int64) * stride_slot
    dims = tl.arange(0, HEAD_PAD)
    in_head = seen[:, None] & (dims < D)[None, :]
    return tl.load(keys_ptr + at[:, None] + dims[None, :], mask=in_head, other=0)


@triton.jit
def _products(one, other, IS_WIDENED: tl.constexpr):
    """Of rows of one with rows of the other. [rows of one, rows of the other], float32."""
    if IS_WIDENED:
        one, other = one.to(tl.float32), other.to(tl.float32)
    return tl.dot(one, tl.trans(other), input_precision="tf32x3")


@triton.jit(do_not_specialize=CHANGING, do_not_specialize_on_alignment=("table_ptr",))
def log_sum_exps(
    lse_ptr, queries_ptr, keys_ptr, table_ptr, positions_ptr,
    scale_log2, num_queries, num_tokens,
    stride_query_head, stride_query_group, stride_query,
    stride_block, stride_head, stride_slot,
    GROUP: tl.constexpr, IS_PAGED: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, HEAD_PAD: tl.constexpr,
    NUM_ROWS: tl.constexpr, TILE: tl.constexpr, IS_WIDENED: tl.constexpr,
):  # fmt: skip
    """Of each query over the tokens up to its own, in one split. Grid: query rows, K, S.

    Args:
        lse_ptr: -inf where a split shows a query nothing. [S, K, G, Q], float32.
        queries_ptr: [K, G, Q, D].
        keys_ptr: the cache, [blocks, K, n, ..], whose last axis begins with a key; or the keys
            themselves, [K, T, D].
        table_ptr: block ids, int64; not read where keys are not paged.
        positions_ptr: ascending. [Q].
        scale_log2: softmax scale times log2 of e, positive.
    """
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    rows = tl.program_id(0) * NUM_ROWS + tl.arange(0, NUM_ROWS)
    query, group_head = rows // GROUP, rows % GROUP
    is_query = query < num_queries
    last_seen = tl.load(positions_ptr + query, mask=is_query, other=-1).to(tl.int32)
    last_seen = tl.minimum(last_seen, num_tokens - 1)
    dims = tl.arange(0, HEAD_PAD)
    at = kv_head.to(tl.int64) * stride_query_head + query.to(tl.int64) * stride_query
    at += group_head * stride_query_group
    in_head = is_query[:, None] & (dims < D)[None, :]
    queries = tl.load(queries_ptr + at[:, None] + dims[None, :], mask=in_head, other=0)

    num_tiles = tl.cdiv(tl.max(last_seen) + 1, TILE)
    tiles_per_split = tl.cdiv(num_tiles, tl.num_programs(2))
    first_tile = tl.minimum(split * tiles_per_split, num_tiles)
    last_tile = tl.minimum(first_tile + tiles_per_split, num_tiles)
    keys_ptr += kv_head.to(tl.int64) * stride_head
    peaks = tl.full([NUM_ROWS], LOWEST, tl.float32)
    totals = tl.zeros([NUM_ROWS], tl.float32)
    for tile in range(first_tile, last_tile):
        tokens = tile * TILE + tl.arange(0, TILE)
        keys = _load_keys(
            tokens, num_tokens, keys_ptr, table_ptr, stride_block, stride_slot,
            IS_PAGED, N, D, HEAD_PAD,
        )  # fmt: skip
        products = _products(queries, keys, IS_WIDENED)
        products = tl.where(tokens[None, :] <= last_seen[:, None], products, float("-inf"))
        new_peaks = tl.maximum(peaks, tl.max(products, axis=1))
        weights = tl.exp2(products * scale_log2 - (new_peaks * scale_log2)[:, None])
        totals = totals * tl.exp2((peaks - new_peaks) * scale_log2) + tl.sum(weights, axis=1)
        peaks = new_peaks

    seen_totals = tl.where(totals > 0, totals, 1.0)
    lse = tl.where(totals > 0, peaks * scale_log2 + tl.log2(seen_totals), float("-inf"))
    first = split * tl.num_programs(1) + kv_head
    at = (first * GROUP + group_head).to(tl.int64) * num_queries + query
    tl.store(lse_ptr + at, lse, mask=is_query)


@triton.jit(do_not_specialize=CHANGING)
def merge_log_sum_exps(lse_ptr, split_lse_ptr, num_rows, num_splits, NUM_ROWS: tl.constexpr):
    """Splits added up. Grid: rows, of K, G and Q.

    Args:
        lse_ptr: [rows].
        split_lse_ptr: [S, rows].
    """
    rows = tl.program_id(0) * NUM_ROWS + tl.arange(0, NUM_ROWS)
    peaks = tl.full([NUM_ROWS], LOWEST, tl.float32)
    totals = tl.zeros([NUM_ROWS], tl.float32)
    for split in range(num_splits):
        at = tl.cast(split, tl.int64) * num_rows + rows
        lse = tl.load(split_lse_ptr + at, mask=rows < num_rows, other=float("-inf"))
        new_peaks = tl.maximum(peaks, lse)
        totals = totals * tl.exp2(peaks - new_peaks) + tl.exp2(lse - new_peaks)
        peaks = new_peaks
    seen_totals = tl.where(totals > 0, totals, 1.0)
    lse = tl.where(totals > 0, peaks + tl.log2(seen_totals), float("-inf"))
    tl.store(lse_ptr + rows, lse, mask=rows < num_rows)


@triton.jit
def _probabilities(
    start, stop_query, tokens, keys, lse_ptr, queries_ptr, positions_ptr, scale_log2, stride_query,
    D: tl.constexpr, HEAD_PAD: tl.constexpr, NUM_QUERIES: tl.constexpr, IS_WIDENED: tl.constexpr,
):  # fmt: skip
    """A tile of tokens' from a tile of one head's queries, 0 where a query is before the token.

    Returns:
        Probabilities, [t, M]; the queries and their positions, [M].
    """
    query = start + tl.arange(0, NUM_QUERIES)
    is_query = query < stop_query
    dims = tl.arange(0, HEAD_PAD)
    pointers = queries_ptr + (query.to(tl.int64) * stride_query)[:, None] + dims[None, :]
    queries = tl.load(pointers, mask=is_query[:, None] & (dims < D)[None, :], other=0)
    lse = tl.load(lse_ptr + query, mask=is_query, other=float("inf"))
    positions = tl.load(positions_ptr + query, mask=is_query, other=-1).to(tl.int32)
    products = _products(keys, queries, IS_WIDENED)
    attention = tl.exp2(products * scale_log2 - lse[None, :])
    attention = tl.where(tokens[:, None] <= positions[None, :], attention, 0.0)
    return attention, query, positions


@triton.jit(do_not_specialize=CHANGING, do_not_specialize_on_alignment=("table_ptr",))
def receive(
    received_ptr, lse_ptr, queries_ptr, keys_ptr, table_ptr, positions_ptr,
    scale_log2, num_queries, window_first, window_stop, last_first, num_tokens,
    stride_query_head, stride_query_group, stride_query,
    stride_block, stride_head, stride_slot,
    GROUP: tl.constexpr, IS_PAGED: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, HEAD_PAD: tl.constexpr,
    TILE: tl.constexpr, NUM_QUERIES: tl.constexpr, MIN_DISTANCE: tl.constexpr,
    HAS_LAST: tl.constexpr, FROM_AFAR: tl.constexpr, IS_WIDENED: tl.constexpr,
):  # fmt: skip
    """Probabilities of one tile of tokens, put together over the queries. Grid: tiles, K * G.

    Queries before the window are asked for one thing only, so they have a loop of their own.

    Args:
        received_ptr: the maximum over the last queries with HAS_LAST, the window's sum, and with
            FROM_AFAR the maximum over MIN_DISTANCE tokens or more; 0 where nothing counts.
            [maps, K, G, T], float32.
        lse_ptr: of all queries. [K, G, Q].
        queries_ptr: and the next three as for ``log_sum_exps``.
        window_first, window_stop: the window's queries.
        last_first: the last ones begin here, in the window or behind it.
    """
    kv_head, group_head = tl.program_id(1) // GROUP, tl.program_id(1) % GROUP
    first_token = tl.program_id(0) * TILE
    tokens = first_token + tl.arange(0, TILE)
    keys = _load_keys(
        tokens, num_tokens, keys_ptr + kv_head.to(tl.int64) * stride_head, table_ptr,
        stride_block, stride_slot, IS_PAGED, N, D, HEAD_PAD,
    )  # fmt: skip
    first_seeing = 0
    for start in range(0, num_queries, COUNTED):
        query = start + tl.arange(0, COUNTED)
        is_query = query < num_queries
        positions = tl.load(positions_ptr + query, mask=is_query, other=0).to(tl.int32)
        first_seeing += tl.sum((is_query & (positions < first_token)).to(tl.int32))

    queries_ptr += kv_head.to(tl.int64) * stride_query_head + group_head * stride_query_group
    lse_ptr += tl.program_id(1).to(tl.int64) * num_queries
    last = tl.zeros([TILE], tl.float32)
    total = tl.zeros([TILE], tl.float32)
    afar = tl.zeros([TILE], tl.float32)
    if FROM_AFAR:
        for start in range(first_seeing, window_first, NUM_QUERIES):
            attention, _, positions = _probabilities(
                start, window_first, tokens, keys, lse_ptr, queries_ptr, positions_ptr,
                scale_log2, stride_query, D, HEAD_PAD, NUM_QUERIES, IS_WIDENED,
            )  # fmt: skip
            is_far = tokens[:, None] <= (positions - MIN_DISTANCE)[None, :]
            afar = tl.maximum(afar, tl.max(tl.where(is_far, attention, 0.0), axis=1))
    for start in range(tl.maximum(first_seeing, window_first), num_queries, NUM_QUERIES):
        attention, query, positions = _probabilities(
            start, num_queries, tokens, keys, lse_ptr, queries_ptr, positions_ptr,
            scale_log2, stride_query, D, HEAD_PAD, NUM_QUERIES, IS_WIDENED,
        )  # fmt: skip
        if HAS_LAST:
            is_last = (query >= last_first)[None, :]
            last = tl.maximum(last, tl.max(tl.where(is_last, attention, 0.0), axis=1))
        in_window = (query < window_stop)[None, :]
        attention = tl.where(in_window, attention, 0.0)
        total += tl.sum(attention, axis=1)
        if FROM_AFAR:
            is_far = tokens[:, None] <= (positions - MIN_DISTANCE)[None, :]
            afar = tl.maximum(afar, tl.max(tl.where(is_far, attention, 0.0), axis=1))

    is_token = tokens < num_tokens
    apart = tl.num_programs(1).to(tl.int64) * num_tokens
    received_ptr += tl.program_id(1).to(tl.int64) * num_tokens + tokens
    if HAS_LAST:
        tl.store(received_ptr, last, mask=is_token)
        received_ptr += apart
    tl.store(received_ptr, total, mask=is_token)
    if FROM_AFAR:
        tl.store(received_ptr + apart, afar, mask=is_token)
