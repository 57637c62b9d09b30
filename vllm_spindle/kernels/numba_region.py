"""Merged tokens of the decode kernel: entries, codes and norms as they lie in a region's blocks.

Key entries stream; each is rotated once per token for all query heads; probabilities are added
onto the value entries, which are multiplied once at the end.

Shapes: L query heads of one pass (lanes), D head size. Arrays are laid out in ``region_shape``.
"""

import numpy as np

from vllm_spindle.kernels import region_shape
from vllm_spindle.kernels.numba_softmax import (
    from_half,
    inlined,
    scale_lanes,
    scratch,
    softmax_step,
)
from vllm_spindle.kernels.numba_vector import (
    PART,
    add_parts,
    add_rows,
    add_scaled,
    copy_bits,
    prefetch,
    rotate_and_dot,
)

POSITION_BITS = np.int32(region_shape.POSITION_BITS)
EMPTY = np.uint16(region_shape.EMPTY)
TILE = 2048  # tokens per step of the online softmax; at 512 a step's own cost showed
STRETCH = 64  # tokens whose products are finished together
AHEAD = 8  # tokens: how far ahead cosines are fetched; positions jump, so the hardware does not
ROWS_AHEAD = 16  # entries: the hardware starts anew with every page and chunk


@inlined
def _place(run, element):
    """Offset of one element of a head's run of chunks, and how many follow it in its chunk.

    A run: block table, first column, elements of a block, start of the head in it, chunk size.
    """
    table, first_block, block_stride, head_start, chunk = run
    block, offset = divmod(np.uint32(element), np.uint32(chunk))  # 64-bit division is slow
    at = np.uint64(table[np.uint64(first_block) + block]) * np.uint64(block_stride)
    return at + np.uint64(head_start) + np.uint64(offset), chunk - np.int64(offset)


@inlined
def _copy_run(bits, run, start, out, count):
    """Elements [start, start + count) of a head's run."""
    done = 0
    while done < count:
        at, left = _place(run, start + done)
        size = min(count - done, left)
        copy_bits(bits, at, out, np.uint64(done), np.uint64(size))
        done += size


@inlined
def _count_tokens(bits, run, position_at, num_slots):
    """Tokens in the slots: those without one come last, and their positions tell."""
    first, last = 0, num_slots
    while first < last:
        middle = (first + last) // 2
        at, _ = _place(run, position_at + 2 * middle + 1)
        if bits[at] == EMPTY:
            last = middle
        else:
            first = middle + 1
    return first


@inlined
def _multiply_entries(dims, lanes, bits, run, codes, cos_sin, positions, queries, scales, products,
                      count):  # fmt: skip
    """products[t] = scale t * (entry of token t, rotated at its position) . queries."""
    head_size, num_lanes = 16 * len(dims), len(lanes)
    d, step = np.uint64(head_size), np.uint64(num_lanes)
    size = PART * ((num_lanes + 3) // 4)
    parts = scratch((STRETCH + 1) * size)
    # Tokens go in pairs; the last of an odd number has itself for company.
    codes[count], positions[count] = codes[count - 1], 0
    # Of the chunk that is being read: where entry 0 would lie, and the first code behind it.
    base, limit = np.uint64(0), np.int64(-1)
    for start in range(0, count, STRETCH):
        stop = min(start + STRETCH, count)
        for first in range(start, stop, 2):
            t, at = np.uint64(first), np.uint64((first - start) * size)
            other = t + np.uint64(1)
            for i in range(2):
                ahead = positions[t + np.uint64(AHEAD + i)]
                prefetch(dims, cos_sin, np.uint64(ahead) * d)
            code, other_code = np.int64(codes[t]), np.int64(codes[other])
            if other_code < limit:
                one_at, other_at = base + np.uint64(code) * d, base + np.uint64(other_code) * d
            else:
                one_at, _ = _place(run, code * head_size)
                other_at, left = _place(run, other_code * head_size)
                base = other_at - np.uint64(other_code) * d
                limit = other_code + left // head_size
            prefetch(dims, bits, other_at + np.uint64(ROWS_AHEAD * head_size))
            rotate_and_dot(
                dims, lanes, bits, one_at, other_at, cos_sin,
                np.uint64(positions[t]) * d, np.uint64(positions[other]) * d,
                queries, parts, at,
            )  # fmt: skip
        for token in range(start, stop):
            t, at = np.uint64(token), np.uint64((token - start) * size)
            add_parts(dims, lanes, parts, at, scales[t], products, t * step)


@inlined
def add_weighted_rows(dims, lanes, bits, at, count, weights, at_weights, out):
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


@inlined
def attend_region(dims, lanes, bits, run, shape, cos_sin, queries, scale, peaks, totals,
                  factors, out):  # fmt: skip
    """Merged tokens of one kv head. run: see ``_place``; shape: key, value entries, slots."""
    head_size, num_lanes = 16 * len(dims), len(lanes)
    step = np.uint64(num_lanes)
    num_key_entries, num_value_entries, num_slots = shape[0], shape[1], shape[2]
    # Elements where the per-token arrays start; see ``region_shape``.
    array_size = (num_slots + head_size - 1) // head_size * head_size
    key_code_at = (num_key_entries + num_value_entries) * head_size
    num_tokens = _count_tokens(bits, run, key_code_at + 4 * array_size, num_slots)
    codes = np.empty(TILE + 1, np.uint16)
    value_codes = np.empty(TILE, np.uint16)
    norms = np.empty(TILE, np.uint16)
    # Zeros behind the tile: prefetching may look there, which costs nothing.
    positions = np.zeros(TILE + AHEAD + 2, np.int32)
    halves = np.empty(2 * TILE, np.uint16)
    scales = np.empty(TILE, np.float32)
    products = scratch((TILE + 17) * num_lanes)
    weights = scratch(num_value_entries * num_lanes)
    weights[:] = 0
    for start in range(0, num_tokens, TILE):
        count = min(TILE, num_tokens - start)
        array = key_code_at + start
        _copy_run(bits, run, array, codes, count)
        _copy_run(bits, run, array + array_size, value_codes, count)
        _copy_run(bits, run, array + 2 * array_size, norms, count)
        _copy_run(bits, run, array + 4 * array_size + start, halves, 2 * count)
        for t in range(count):
            scales[t] = from_half(norms[t]) * scale
            high = np.int32(halves[2 * t + 1]) << POSITION_BITS
            positions[t] = high + np.int32(halves[2 * t])
        _copy_run(bits, run, array + 3 * array_size, norms, count)
        _multiply_entries(
            dims, lanes, bits, run, codes, cos_sin, positions, queries, scales, products, count
        )
        if softmax_step(lanes, products, count, peaks, totals, factors) and start:
            scale_lanes(lanes, weights, factors)
        for i in range(count):
            t = np.uint64(i)
            norm = from_half(norms[t])
            add_scaled(lanes, products, t * step, norm, weights, np.uint64(value_codes[t]) * step)
    done = 0
    while done < num_value_entries:
        at, left = _place(run, (num_key_entries + done) * head_size)
        count = min(num_value_entries - done, left // head_size)
        add_weighted_rows(dims, lanes, bits, at, count, weights, np.uint64(done) * step, out)
        done += count
