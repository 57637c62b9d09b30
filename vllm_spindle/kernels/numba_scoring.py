"""Attention that a prompt's tokens receive from its observed queries, compiled for the CPU.

A few queries at a time: their products with all keys, which fit a core's cache, a softmax each, and
what is asked put together, before the next few. So every product and power is computed once, and
no matrix of queries times tokens is in memory. ``host_scoring`` prepares; slow twin:
``core.scoring.answer``.

Shapes: K kv heads, G query heads per kv head, Q observed queries, T prompt tokens, P tokens with
room, a multiple of ``STRIP``, D head size.
"""

import zlib
from pathlib import Path

import numpy as np
from numba import njit, prange

from vllm_spindle.kernels.numba_cache import cached_njit
from vllm_spindle.kernels.numba_products import ROWS, STRIP, dot_strip
from vllm_spindle.kernels.numba_softmax import FAST, LOWEST, exp2, inlined, scratch

# Loops over finite numbers, so their order and NaN do not matter: maxima and sums by vectors.
_over_numbers = njit(fastmath=FAST | {"nnan", "reassoc"}, error_model="numpy", nogil=True)


@_over_numbers
def _softmax(logits, count, scale):
    """In place: ``2 ** (scale * (x - peak))`` of the first ``count``. Their sum's inverse.

    In whole strips, as LLVM makes no vectors of a maximum over all.
    """
    padded = (count + STRIP - 1) // STRIP * STRIP
    for i in range(count, padded):
        logits[i] = LOWEST
    peaks = np.full(STRIP, LOWEST, np.float32)
    for start in range(0, padded, STRIP):
        part = logits[start : start + STRIP]
        for i in range(STRIP):
            peaks[i] = max(peaks[i], part[i])
    shift = np.max(peaks) * scale
    total = np.float32(0)
    for i in range(padded):
        weight = exp2(logits[i] * scale - shift)
        logits[i] = weight
        total += weight
    return np.float32(1) / total


@inlined
def _keep_larger(received, weights, factor, count):
    for i in range(count):
        received[i] = max(received[i], weights[i] * factor)


@inlined
def _add(received, weights, factor, count):
    for i in range(count):
        received[i] += weights[i] * factor


@inlined
def _receive_head(item, maps, queries, keys, positions, scale, window_first, window_stop,
                  last_first, min_distance):  # fmt: skip
    """All queries of one query head."""
    num_kv_heads, num_pairs, room = keys.shape
    group, num_queries = queries.shape[1], queries.shape[2]
    num_tokens = maps.shape[3]
    kv_head, head = divmod(np.int64(item), group)
    flat_keys, flat_queries = keys.reshape(-1), queries.reshape(-1)
    key_at = np.uint64(kv_head * num_pairs * room)
    logits = scratch(ROWS * room)
    last, total, afar = maps[0, kv_head, head], maps[1, kv_head, head], maps[2, kv_head, head]
    for first in range(0, num_queries, ROWS):
        # The last few once more where they do not come out even; what is done twice is not kept.
        start = max(0, min(first, num_queries - ROWS))
        stop = min(start + ROWS, num_queries)
        seen = min(num_tokens, positions[stop - 1] + 1)
        query_at = np.uint64(((kv_head * group + head) * num_queries + start) * num_pairs)
        for token in range(0, seen, STRIP):
            dot_strip(
                flat_queries, query_at, np.uint64(num_pairs), flat_keys,
                key_at + np.uint64(token), np.uint64(room), logits, np.uint64(token),
                np.uint64(room),
            )  # fmt: skip
        for query in range(first, stop):
            weights = logits[(query - start) * room : (query - start + 1) * room]
            count = min(num_tokens, positions[query] + 1)
            factor = _softmax(weights, count, scale)
            if query >= last_first:
                _keep_larger(last, weights, factor, count)
            if window_first <= query < window_stop:
                _add(total, weights, factor, count)
            if query < window_stop and min_distance >= 0:
                far = min(num_tokens, max(0, positions[query] - min_distance + 1))
                _keep_larger(afar, weights, factor, far)


def _outer(name: str, sources: int, **options):
    """A kernel over all query heads; ``sources`` as in ``numba_decode``."""

    def receive(maps, queries, keys, positions, scale, window_first, window_stop, last_first,
                min_distance):  # fmt: skip
        sources  # noqa: B018
        for item in prange(keys.shape[0] * queries.shape[1]):
            _receive_head(
                item, maps, queries, keys, positions, scale, window_first, window_stop,
                last_first, min_distance,
            )  # fmt: skip

    receive.__name__ = receive.__qualname__ = name
    return cached_njit(fastmath=FAST, error_model="numpy", nogil=True, **options)(receive)


def _sources() -> int:
    names = ("llvm_vectors", "numba_products", "numba_softmax", "numba_vector", "numba_scoring")
    folder = Path(__file__).parent
    return zlib.crc32(b"".join((folder / f"{name}.py").read_bytes() for name in names))


# Maps of the last queries, the window and from afar, zeros before, [3, K, G, T], float32; queries,
# [K, G, Q, D / 2], at least ROWS of them, and keys, [K, D / 2, P], int32 with two bf16 each;
# positions, [Q], int64; scale times log2 of e; ``min_distance`` -1 where nobody asks from afar.
receive_serial = _outer("receive_serial", _sources())
receive_parallel = _outer("receive_parallel", _sources(), parallel=True)
