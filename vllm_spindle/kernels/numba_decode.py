"""Decode attention over codebook regions and their dense tails, compiled for the CPU.

One pass with an online softmax. Key entries stream, each is rotated once per token for all query
heads; probabilities are added onto the value entries, which are multiplied once at the end.

Shapes: B rows, K kv heads, G query heads per kv head, L query heads of one pass (lanes), N merged
tokens, E value entries, D head size, n tokens per block. Method: SpindleKV sec. 3.3
(arXiv:2507.06517). Slow twin: ``core.reference.attend_codebook``.

``dims`` and ``lanes`` are tuples whose lengths, D / 16 and L, become constants of the code.
"""

import numpy as np
from numba import njit, prange

from vllm_spindle.kernels.numba_vector import (
    add_rows,
    add_scaled,
    bits_to_float,
    copy_bits,
    dot_columns,
    float_to_bits,
    load_row,
    prefetch,
    rotate_and_dot,
)

TILE = 512  # merged tokens per step of the online softmax: the scratch stays in the first cache
GROUP = 16  # tail tokens per step: a vector of keys
AHEAD = 8  # tokens: how far ahead cosines are fetched; positions jump, so the hardware does not
ROWS_AHEAD = 16  # entries: the hardware starts anew with every page and chunk
LOWEST = np.float32(-1e30)
LOG2_E = np.float32(1.4426950408889634)

FAST = {"contract", "nsz", "arcp"}  # not "fast", which forbids NaN: see ``numba_vector``
_inner = njit(fastmath=FAST, error_model="numpy", nogil=True)
_outer = njit(fastmath=FAST, error_model="numpy", nogil=True, cache=True)


@_inner
def _from_bf16(bits):
    return bits_to_float(np.uint32(bits) << np.uint32(16))


@_inner
def _to_bf16(number):
    bits = float_to_bits(number)
    return np.uint16(
        (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    )


@_inner
def _from_half(bits):
    """A float16 that is not negative: shifted into place, then the exponents' biases made equal."""
    return bits_to_float(np.uint32(bits) << np.uint32(13)) * np.float32(2.0**112)


@_inner
def _exp2(x):
    """2 ** x for x <= 0, relative error below 2e-7; as 2 ** -126 below that."""
    x = max(x, np.float32(-126))
    whole = np.floor(x)
    part = (x - whole) * np.float32(0.6931471805599453)
    power = np.float32(1 / 5040)
    power = power * part + np.float32(1 / 720)
    power = power * part + np.float32(1 / 120)
    power = power * part + np.float32(1 / 24)
    power = power * part + np.float32(1 / 6)
    power = power * part + np.float32(1 / 2)
    power = power * part + np.float32(1)
    power = power * part + np.float32(1)
    return power * bits_to_float(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23))


@_inner
def _scratch(size):
    """Uninitialised float32 at the start of a cache line: a vector across two lines takes twice."""
    room = np.empty(size + 16, np.float32)
    start = (-room.ctypes.data & 63) // 4
    return room[start : start + size]


@_inner
def _copy_run(bits, table, first_block, block_stride, head_start, chunk, start, out, count):
    """Elements [start, start + count) of a head's run of chunks."""
    done = 0
    while done < count:
        block, offset = divmod(start + done, chunk)
        size = min(count - done, chunk - offset)
        at = np.uint64(table[first_block + block]) * block_stride + head_start
        copy_bits(bits, at + np.uint64(offset), out, np.uint64(done), np.uint64(size))
        done += size


@_inner
def _softmax_step(lanes, products, count, peaks, totals, factors):
    """Turn a tile's products (log2) into weights, in place; update the running peaks and totals.

    Args:
        products: flat [count, L], with room for 16 more tokens.
        peaks: running maximum of each lane. [L].
        totals: running sum of weights of each lane. [L].
        factors: out: what all earlier weights must be multiplied with. [L].

    Returns:
        Whether any factor is not 1.
    """
    num_lanes = len(lanes)
    width = 16 * num_lanes  # a multiple of the vector and of L, so that lane = index mod L
    wide = _scratch(16 * num_lanes)
    sums = _scratch(16 * num_lanes)
    for i in range(width):
        wide[i] = LOWEST
        sums[i] = np.float32(0)
        products[count * num_lanes + i] = LOWEST
    stop = (count * num_lanes + width - 1) // width * width
    for start in range(0, stop, width):
        part = products[start : start + width]
        for i in range(width):
            wide[i] = max(wide[i], part[i])
    grew = False
    for lane in range(num_lanes):
        peak = peaks[lane]
        for i in range(lane, width, num_lanes):
            peak = max(peak, wide[i])
        factors[lane] = _exp2(peaks[lane] - peak)
        grew |= peak > peaks[lane]
        peaks[lane] = peak
    for i in range(width):
        wide[i] = peaks[i % num_lanes]
    for start in range(0, stop, width):
        part = products[start : start + width]
        for i in range(width):
            weight = _exp2(part[i] - wide[i])
            part[i] = weight
            sums[i] += weight
    for lane in range(num_lanes):
        total = totals[lane] * factors[lane]
        for i in range(lane, width, num_lanes):
            total += sums[i]
        totals[lane] = total
    return grew


@_inner
def _scale_lanes(lanes, rows, factors):
    """rows[i, g] *= factors[g]. rows: flat [., L]."""
    num_lanes = len(lanes)
    for i in range(len(rows) // num_lanes):
        for lane in range(num_lanes):
            rows[i * num_lanes + lane] *= factors[lane]


@_inner
def _add_value_rows(dims, lanes, bits, at, count, weights, at_weights, out):
    """out[g] += sum of ``count`` neighbouring bf16 rows, weighted."""
    head_size, num_lanes = np.uint64(16 * len(dims)), np.uint64(len(lanes))
    done = 0
    while done < count:
        row = np.uint64(done)
        here, weight = at + row * head_size, at_weights + row * num_lanes
        if count - done >= 4:
            for ahead in range(ROWS_AHEAD, ROWS_AHEAD + 4):
                prefetch(dims, bits, here + np.uint64(ahead) * head_size)
            add_rows(dims, lanes, (0, 0, 0, 0), bits, here, weights, weight, out)
            done += 4
        else:
            add_rows(dims, lanes, (0,), bits, here, weights, weight, out)
            done += 1


@_inner
def _load_entry(dims, bits, table, first_block, block_stride, head_start, rows_per_chunk, row,
                entries, slot):  # fmt: skip
    """One row of a head's run of chunks, as float32, into the scratch."""
    head_size = np.uint64(16 * len(dims))
    block, row = divmod(row, rows_per_chunk)
    at = np.uint64(table[first_block + block]) * block_stride + head_start
    at += np.uint64(row) * head_size
    prefetch(dims, bits, at + np.uint64(ROWS_AHEAD) * head_size)
    load_row(dims, bits, at, entries, slot)


@_inner
def _attend_region(dims, lanes, cache, bits, table, first_block, shape, head, table_cos_sin,
                   queries, scale, peaks, totals, factors, out):  # fmt: skip
    """Merged tokens of one kv head. shape: entries of keys and values, tokens, array rows."""
    head_size, num_lanes = 16 * len(dims), len(lanes)
    d, wide_lanes = np.uint64(head_size), np.uint64(num_lanes)
    chunk = cache.shape[2]
    rows_per_chunk = chunk // head_size
    block_stride = np.uint64(cache.shape[1] * chunk)
    head_start = np.uint64(head * chunk)
    num_key_entries, num_value_entries, num_tokens = shape[0], shape[1], shape[2]
    # Elements where the per-token arrays start; see ``region_shape``.
    short = (num_tokens + head_size - 1) // head_size * head_size
    key_code_at = (num_key_entries + num_value_entries) * head_size
    codes = np.empty(TILE, np.uint16)
    value_codes = np.empty(TILE, np.uint16)
    half = np.empty(TILE, np.uint16)
    raw_positions = np.empty(2 * TILE, np.uint16)
    positions = raw_positions.view(np.int32)
    scales = np.empty(TILE, np.float32)
    products = _scratch((TILE + 16) * num_lanes)
    entries = _scratch(2 * head_size)
    weights = _scratch(num_value_entries * num_lanes)
    weights[:] = 0
    slot, loaded = np.uint64(0), -1
    for start in range(0, num_tokens, TILE):
        count = min(TILE, num_tokens - start)
        array = key_code_at + start
        _copy_run(bits, table, first_block, block_stride, head_start, chunk, array, codes, count)
        _copy_run(
            bits,
            table,
            first_block,
            block_stride,
            head_start,
            chunk,
            array + short,
            value_codes,
            count,
        )
        _copy_run(
            bits,
            table,
            first_block,
            block_stride,
            head_start,
            chunk,
            array + 2 * short,
            half,
            count,
        )
        for t in range(count):
            scales[t] = _from_half(half[t]) * scale
        _copy_run(
            bits,
            table,
            first_block,
            block_stride,
            head_start,
            chunk,
            array + 3 * short,
            half,
            count,
        )
        array += 4 * short + start
        _copy_run(
            bits,
            table,
            first_block,
            block_stride,
            head_start,
            chunk,
            array,
            raw_positions,
            2 * count,
        )
        for t in range(0, count, 2):
            other = min(t + 1, count - 1)  # the last of an odd number is done twice
            for ahead in range(t + AHEAD, min(t + AHEAD + 2, count)):
                prefetch(dims, table_cos_sin, np.uint64(positions[ahead]) * d)
            code = np.int64(codes[t])
            if code != loaded:
                _load_entry(dims, bits, table, first_block, block_stride, head_start,
                            rows_per_chunk, code, entries, slot * d)  # fmt: skip
            loaded, first = code, slot
            code = np.int64(codes[other])
            if code != loaded:
                slot = np.uint64(1) - slot
                _load_entry(dims, bits, table, first_block, block_stride, head_start,
                            rows_per_chunk, code, entries, slot * d)  # fmt: skip
            loaded = code
            rotate_and_dot(
                dims, lanes, entries, first * d, slot * d, table_cos_sin,
                np.uint64(positions[t]) * d, np.uint64(positions[other]) * d,
                queries, scales[t], scales[other], products, np.uint64(t) * wide_lanes,
            )  # fmt: skip
        if _softmax_step(lanes, products, count, peaks, totals, factors) and start:
            _scale_lanes(lanes, weights, factors)
        for t in range(count):
            token, entry = np.uint64(t) * wide_lanes, np.uint64(value_codes[t]) * wide_lanes
            add_scaled(lanes, products, token, _from_half(half[t]), weights, entry)
    done = 0
    while done < num_value_entries:
        block, row = divmod(num_key_entries + done, rows_per_chunk)
        count = min(num_value_entries - done, rows_per_chunk - row)
        at = np.uint64(table[first_block + block]) * block_stride + head_start + np.uint64(row) * d
        _add_value_rows(dims, lanes, bits, at, count, weights, np.uint64(done) * wide_lanes, out)
        done += count


@_inner
def _attend_tail(dims, lanes, cache, bits, table, first_block, num_tokens, head, key_index,
                 value_index, queries, scale, peaks, totals, factors, out):  # fmt: skip
    """Dense tokens of one kv head. The index tables are [n, D], or empty for the vec packing."""
    head_size, num_lanes = 16 * len(dims), len(lanes)
    chunk = cache.shape[2]
    block_size = chunk // (2 * head_size)
    stride = np.uint64(block_size)
    products = _scratch((block_size + 32) * num_lanes)
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
        if _softmax_step(lanes, products, count, peaks, totals, factors):
            for lane in range(num_lanes):
                for dim in range(head_size):
                    out[lane * head_size + dim] *= factors[lane]
        value_at = key_at + np.uint64(chunk // 2)
        _add_value_rows(dims, lanes, source, value_at, count, products, np.uint64(0), out)


@_inner
def _attend_item(item, dims, lanes, query, output, cache, cos_sin, block_table, starts, shapes,
                 tail_lens, query_start, key_index, value_index, scale):  # fmt: skip
    """All queries of one row and kv head."""
    num_kv_heads = cache.shape[1]
    row, head = divmod(np.int64(item), num_kv_heads)  # prange counts in uint64
    head_size, num_lanes = 16 * len(dims), len(lanes)
    group = query.shape[1] // num_kv_heads
    bits = cache.reshape(-1)
    table = block_table[row]
    peaks, totals = np.empty(num_lanes, np.float32), np.empty(num_lanes, np.float32)
    factors = np.empty(num_lanes, np.float32)
    queries = _scratch(num_lanes * head_size)
    queries[:] = 0
    out = _scratch(num_lanes * head_size)
    for token in range(query_start[row], query_start[row + 1]):
        num_seen = tail_lens[row] - (query_start[row + 1] - token) + 1
        for first in range(0, group, num_lanes):
            used = min(num_lanes, group - first)
            for lane in range(used):
                for dim in range(head_size):
                    queries[lane * head_size + dim] = _from_bf16(
                        query[token, head * group + first + lane, dim]
                    )
            for lane in range(num_lanes):
                peaks[lane], totals[lane] = LOWEST, np.float32(0)
            for i in range(len(out)):
                out[i] = np.float32(0)
            if shapes[row, 2] > 0:
                _attend_region(
                    dims, lanes, cache, bits, table, starts[row, 0], shapes[row], head, cos_sin,
                    queries, scale, peaks, totals, factors, out,
                )  # fmt: skip
            _attend_tail(
                dims, lanes, cache, bits, table, starts[row, 1], num_seen, head, key_index,
                value_index, queries, scale, peaks, totals, factors, out,
            )  # fmt: skip
            for lane in range(used):
                share = np.float32(1) / totals[lane]
                for dim in range(head_size):
                    output[token, head * group + first + lane, dim] = _to_bf16(
                        out[lane * head_size + dim] * share
                    )


@_outer
def attend_serial(dims, lanes, query, output, cache, cos_sin, block_table, starts, shapes,
                  tail_lens, query_start, key_index, value_index, scale):  # fmt: skip
    """All rows and kv heads, one after the other. See ``decode.RegionDecoder``."""
    for item in range(len(tail_lens) * cache.shape[1]):
        _attend_item(
            item, dims, lanes, query, output, cache, cos_sin, block_table, starts, shapes,
            tail_lens, query_start, key_index, value_index, scale,
        )  # fmt: skip


@njit(fastmath=FAST, error_model="numpy", nogil=True, cache=True, parallel=True)
def attend_parallel(dims, lanes, query, output, cache, cos_sin, block_table, starts, shapes,
                    tail_lens, query_start, key_index, value_index, scale):  # fmt: skip
    """The same over numba's threads."""
    for item in prange(len(tail_lens) * cache.shape[1]):
        _attend_item(
            item, dims, lanes, query, output, cache, cos_sin, block_table, starts, shapes,
            tail_lens, query_start, key_index, value_index, scale,
        )  # fmt: skip
