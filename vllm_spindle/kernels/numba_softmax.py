"""Numbers and the online softmax of the decode kernel.

Shapes: L query heads of one pass (lanes). ``lanes`` is a tuple whose length L becomes a constant.
"""

import numpy as np
from numba import njit

from vllm_spindle.kernels.numba_vector import bits_to_float, float_to_bits

LOWEST = np.float32(-1e30)
LOG2_E = np.float32(1.4426950408889634)
TO_WHOLE = np.float32(1.5 * 2**23)  # float32 numbers of this size have no fraction
# Of 2 ** x on [-1/2, 1/2], exact at 0.
POWERS = (
    1.0,
    0.6931468844413757,
    0.24022237956523895,
    0.05550890043377876,
    0.009671683423221111,
    0.0013219458051025867,
)
FAST = {"contract", "nsz", "arcp"}  # not "fast", which forbids NaN: see ``llvm_vectors``
inlined = njit(fastmath=FAST, error_model="numpy", nogil=True)


@inlined
def from_bf16(bits):
    return bits_to_float(np.uint32(bits) << np.uint32(16))


@inlined
def to_bf16(number):
    bits = float_to_bits(number)
    return np.uint16(
        (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    )


@inlined
def from_half(bits):
    """A float16 that is not negative: shifted into place, then the exponents' biases made equal."""
    return bits_to_float(np.uint32(bits) << np.uint32(13)) * np.float32(2.0**112)


@inlined
def exp2(x):
    """2 ** x for x <= 0, relative error below 2e-7; as 2 ** -126 below that.

    A number with ``TO_WHOLE`` added has the nearest whole number in its lowest bits, which go to
    the exponent as they are.
    """
    moved = max(x, np.float32(-126)) + TO_WHOLE
    part = max(x, np.float32(-126)) - (moved - TO_WHOLE)
    power = np.float32(POWERS[5])
    power = power * part + np.float32(POWERS[4])
    power = power * part + np.float32(POWERS[3])
    power = power * part + np.float32(POWERS[2])
    power = power * part + np.float32(POWERS[1])
    power = power * part + np.float32(POWERS[0])
    return bits_to_float(float_to_bits(power) + (float_to_bits(moved) << np.uint32(23)))


@inlined
def scratch(size):
    """Uninitialised float32 at the start of a cache line: a vector across two lines takes twice."""
    room = np.empty(size + 16, np.float32)
    start = (-room.ctypes.data & 63) // 4
    return room[start : start + size]


@inlined
def softmax_step(lanes, products, count, peaks, totals, factors):
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
    wide = scratch(16 * num_lanes)
    sums = scratch(16 * num_lanes)
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
        factors[lane] = exp2(peaks[lane] - peak)
        grew |= peak > peaks[lane]
        peaks[lane] = peak
    for i in range(width):
        wide[i] = peaks[i % num_lanes]
    for start in range(0, stop, width):
        part = products[start : start + width]
        for i in range(width):
            weight = exp2(part[i] - wide[i])
            part[i] = weight
            sums[i] += weight
    for lane in range(num_lanes):
        total = totals[lane] * factors[lane]
        for i in range(lane, width, num_lanes):
            total += sums[i]
        totals[lane] = total
    return grew


@inlined
def scale_lanes(lanes, rows, factors):
    """rows[i, g] *= factors[g]. rows: flat [., L]."""
    num_lanes = len(lanes)
    for i in range(len(rows) // num_lanes):
        for lane in range(num_lanes):
            rows[i * num_lanes + lane] *= factors[lane]
