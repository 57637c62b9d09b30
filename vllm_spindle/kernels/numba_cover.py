"""The cover, compiled: a part is matched with the entries, and what is left covered greedily.

Shapes: N vectors, M of them in a part, m of those open, E entries so far, D head size. Products are
rough cosines as integers, and what they cannot decide is multiplied again; see ``cover.py``.
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from vllm_spindle.core.cover import UNCOVERED
from vllm_spindle.kernels.numba_cache import cached_njit

BLOCK = 64  # products passed over at once

# The reductions below are over finite numbers, so their order and NaN do not matter.
_compiled = partial(cached_njit, nogil=True, fastmath={"nnan", "nsz", "reassoc"})


class Sources(NamedTuple):
    """The vectors: unit length in float32, and rough, as integers. [N, D] each."""

    directions: np.ndarray
    rough: np.ndarray


class Tables(NamedTuple):
    """What grows: each vector's entry, [N], int64; the entries, and roughly. [at least E, D]."""

    codes: np.ndarray
    entries: np.ndarray
    rough: np.ndarray


class Limits(NamedTuple):
    """A threshold, how far a rough cosine may be off, and both as the integers of rough cosines.

    At or below ``low`` a cosine cannot be above the threshold, above ``high`` it must be. ``shift``
    makes a float32's integer a rough one.
    """

    threshold: np.float32
    margin: np.float32
    low: int
    high: int
    shift: int


@_compiled()
def _cosine(left, right):
    total = np.float32(0)
    for d in range(len(left)):
        total += left[d] * right[d]
    return min(total, np.float32(1))


@_compiled()
def similarity(directions, entries, coded, codes):
    """Cosine of each coded vector to its entry. directions: [N, D]; entries: [E, D]. [coded]."""
    cosines = np.empty(len(coded), np.float32)
    for i in range(len(coded)):
        cosines[i] = _cosine(directions[coded[i]], entries[codes[coded[i]]])
    return cosines


@_compiled()
def add_part(products, part, sources, tables, num_entries, limits):
    """Code a part: the nearest entry above the threshold; the others are covered greedily.

    Args:
        products: rough cosines with the entries and the part itself, as integers.
            [at least M, at least E + M; without room E].
        part: indices of vectors. [M], int64.
        sources: ``Sources``.
        tables: ``Tables``, written to.
        num_entries: E.
        limits: ``Limits``.

    Returns:
        How many entries there are now.
    """
    open_rows = np.empty(len(part), np.int64)  # of the part
    num_open = 0
    for i in range(len(part)):
        if tables.codes[part[i]] == UNCOVERED:
            direction = sources.directions[part[i]]
            row = products[i, :num_entries]
            tables.codes[part[i]] = nearest_entry(row, direction, tables.entries, limits)
            if tables.codes[part[i]] == UNCOVERED:
                open_rows[num_open] = i
                num_open += 1
    room = len(tables.entries) - num_entries
    if room == 0 or num_open == 0:
        return num_entries
    open_rows = open_rows[:num_open]
    graph = similarity_graph(
        products[:, num_entries:], open_rows, sources.directions, part[open_rows], limits
    )
    codes, members = greedy_members(graph, room)
    for i in range(num_open):
        if codes[i] != UNCOVERED:
            tables.codes[part[open_rows[i]]] = num_entries + codes[i]
    for i in range(len(members)):
        vector = part[open_rows[members[i]]]
        tables.entries[num_entries + i] = sources.directions[vector]
        tables.rough[num_entries + i] = sources.rough[vector]
    return num_entries + len(members)


@_compiled()
def nearest_entry(row, direction, entries, limits):
    """First of the nearest entries with a cosine above the threshold, or UNCOVERED.

    Args:
        row: rough cosines, as integers. [E].
        direction: [D].
        entries: [at least E, D].
        limits: ``Limits``.
    """
    width = len(row)
    num_blocks = (width + BLOCK - 1) // BLOCK
    tops = np.empty(num_blocks, row.dtype)  # largest of each block
    peak = limits.low
    for block in range(num_blocks):
        start, stop = block * BLOCK, min(block * BLOCK + BLOCK, width)
        top = row[start]
        for j in range(start, stop):
            top = max(top, row[j])
        tops[block] = top
        peak = max(peak, np.int64(top))
    if peak <= limits.low:
        return UNCOVERED
    least = _from_float(_to_float(peak, limits.shift) - 2 * limits.margin, limits.shift)
    best, nearest = limits.threshold, UNCOVERED
    for block in range(num_blocks):
        if tops[block] < least:
            continue
        for j in range(block * BLOCK, min(block * BLOCK + BLOCK, width)):
            if row[j] < least:
                continue
            if limits.margin > 0:
                cosine = _cosine(direction, entries[j])
            else:
                cosine = min(_to_float(row[j], limits.shift), np.float32(1))
            if cosine > best:
                best, nearest = cosine, j
    return nearest


@_compiled()
def _to_float(integer, shift):
    scratch = np.empty(1, np.int32)
    scratch[0] = integer << shift
    return scratch.view(np.float32)[0]


@_compiled()
def _from_float(value, shift):
    """The next integer below a float that lies between two."""
    scratch = np.empty(1, np.float32)
    scratch[0] = value
    return scratch.view(np.int32)[0] >> shift


@_compiled()
def similarity_graph(products, rows, directions, vectors, limits):
    """Who is above the threshold to whom (eq. 9); everyone to itself.

    Args:
        products: rough cosines of a part's vectors, as integers. [at least M, at least M].
        rows: those of them that are asked for, ascending. [m].
        directions: of all vectors. [N, D].
        vectors: which of those they are. [m].
        limits: ``Limits``.

    Returns:
        [m, m], uint8.
    """
    count = len(rows)
    graph = np.empty((count, count), np.uint8)
    row = np.empty(count, products.dtype)
    for i in range(count):
        near = graph[i]
        num_doubtful = 0
        for j in range(count):
            row[j] = products[rows[i], rows[j]]
        for j in range(count):
            near[j] = row[j] > limits.high
            num_doubtful += row[j] > limits.low
        for j in range(count):
            num_doubtful -= near[j]
        if num_doubtful:
            for j in range(count):
                if limits.low < row[j] <= limits.high:
                    cosine = _cosine(directions[vectors[i]], directions[vectors[j]])
                    near[j] = cosine > limits.threshold
        near[i] = 1
    return graph


@_compiled()
def greedy_members(graph, capacity):
    """Greedy cover (Algorithm 1): take whoever has most open neighbours, repeat.

    Args:
        graph: who is whose neighbour. [m, m], uint8.
        capacity: most members.

    Returns:
        Each vector's entry, UNCOVERED where there was no room, [m]; the members, [E]; int64.
    """
    count = len(graph)
    degrees = np.empty(count, np.int32)  # open neighbours, itself included; -1 once covered
    for i in range(count):
        degree = 0
        for j in range(count):
            degree += graph[i, j]
        degrees[i] = degree
    codes = np.full(count, UNCOVERED, np.int64)
    members = np.empty(min(count, capacity), np.int64)
    num_members, peak, start = 0, 2, 0
    while num_members < capacity:
        # Degrees only fall: once the largest is 1, the rest are alone and come in order.
        member = -1
        if peak > 1:
            peak = 0
            for i in range(count):
                peak = max(peak, degrees[i])
            for i in range(count):
                if degrees[i] == peak:
                    member = i
                    break
            if peak <= 0:
                break
        else:
            for i in range(start, count):
                if degrees[i] > 0:
                    member, start = i, i + 1
                    break
            if member < 0:
                break
        for i in range(count):
            if graph[member, i] and codes[i] == UNCOVERED:
                codes[i] = num_members
                if peak > 1:
                    gone = graph[i]
                    for j in range(count):
                        degrees[j] -= gone[j]
                degrees[i] = -count - 1  # out of reach of any further subtraction
        members[num_members] = member
        num_members += 1
    return codes, members[:num_members]
