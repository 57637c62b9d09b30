"""The compiled decode kernel against the torch oracle, within the rounding of its bf16 output.

One step per case; every tensor random, every spare element of the cache NaN: what is read beyond
the plan shows.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from vllm_spindle.core.codebook import Codebook
from vllm_spindle.core.reference import attend_codebook
from vllm_spindle.kernels import decode
from vllm_spindle.kernels.decode import DecodeRows, RegionDecoder, num_lanes, turning_table
from vllm_spindle.kernels.region import pack_region
from vllm_spindle.kernels.region_shape import RegionShape

NUM_POSITIONS = 3000


@dataclass
class Row:
    """One request: its region, its tail, and what the oracle needs."""

    shape: RegionShape | None
    books: tuple[list[Codebook], list[Codebook]]
    positions: list[Tensor]
    tail: tuple[Tensor, Tensor]
    queries: Tensor
    prefix: tuple[Tensor, Tensor]


def _row(
    num_tokens,
    num_tail,
    num_queries,
    num_heads,
    group,
    head_size,
    entries,
    block_size,
    counts=None,
    num_prefix=0,
):
    """``counts``: tokens of each kv head, where fewer than the slots; whole blocks of prefix."""
    counts = counts or [num_tokens] * num_heads

    def book(num_entries: int, num_tokens: int) -> Codebook:
        directions = torch.nn.functional.normalize(torch.randn(num_entries, head_size), dim=-1)
        return Codebook(
            directions.bfloat16().float(),
            torch.randint(0, num_entries, (num_tokens,)),
            (torch.rand(num_tokens) * head_size**0.5 * 1.5).half().float(),
            torch.ones(num_tokens),
        )

    books = tuple([book(size, count) for count in counts] for size in entries)
    return Row(
        RegionShape(*entries, num_tokens, block_size, head_size) if num_tokens else None,
        books,
        [torch.randperm(NUM_POSITIONS)[:count] for count in counts],
        tuple(torch.randn(num_tail, num_heads, head_size).bfloat16() for _ in range(2)),
        torch.randn(num_queries, num_heads * group, head_size).bfloat16(),
        tuple(torch.randn(num_prefix, num_heads, head_size).bfloat16() for _ in range(2)),
    )


def _cos_sin(head_size: int) -> Tensor:
    angles = torch.arange(NUM_POSITIONS).unsqueeze(1) * 1e4 ** -torch.linspace(0, 1, head_size // 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _check(
    rows: list[Row],
    block_size: int,
    *,
    index=None,
    num_threads: int = 1,
    table_dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Lay the rows out in one cache, run the kernel, compare with the oracle.

    ``index``: permuted offsets of keys and values inside a chunk, for packings that are not vec.
    """
    num_heads, head_size = rows[0].tail[0].shape[1:]
    cos_sin = _cos_sin(head_size).to(table_dtype)
    regions = [row.shape.num_blocks if row.shape else 0 for row in rows]
    tails = [-(-len(row.tail[0]) // block_size) for row in rows]
    prefixes = [len(row.prefix[0]) // block_size for row in rows]
    runs = zip(prefixes, regions, tails, strict=True)
    width = 1 + max(sum(run) for run in runs)
    ids = torch.randperm(len(rows) * width).view(len(rows), width)
    cache = torch.full((ids.numel(), num_heads, block_size, 2 * head_size), float("nan")).bfloat16()
    affine = torch.arange(block_size * head_size)
    key_index = affine.view(head_size, block_size).T if index is None else index[0]
    value_index = affine.view(block_size, head_size) + len(affine) if index is None else index[1]
    for row, blocks, num_region, num_prefix in zip(rows, ids, regions, prefixes, strict=True):
        # Between prefix and region lies one column that nobody reads.
        first = num_prefix + 1
        if row.shape:
            region = blocks[first : first + num_region]
            pack_region(cache, region, row.shape, *row.books, row.positions)
        for column, dense in ((0, row.prefix), (first + num_region, row.tail)):
            for token in range(len(dense[0])):
                block = blocks[column + token // block_size]
                chunk = cache[block].view(num_heads, -1)
                chunk[:, key_index[token % block_size]] = dense[0][token]
                chunk[:, value_index[token % block_size]] = dense[1][token]
    step = DecodeRows.of(
        ids,
        [[p + 1, p + 1 + n] for p, n in zip(prefixes, regions, strict=True)],
        [_counts(row.shape) for row in rows],
        [len(row.tail[0]) for row in rows],
        torch.tensor([0] + [len(row.queries) for row in rows]).cumsum(0),
        prefixes,
    )
    decoder = RegionDecoder(cos_sin, head_size**-0.5, *(index or ()), num_threads=num_threads)
    queries = torch.cat([row.queries for row in rows])
    output = torch.full_like(queries, float("nan"))
    decoder(queries, output, cache, step)
    expected = torch.cat(
        [
            attend_codebook(
                row.queries,
                *row.books,
                row.positions,
                *(torch.cat(dense) for dense in zip(row.prefix, row.tail, strict=True)),
                cos_sin,
                scale=head_size**-0.5,
            )
            for row in rows
        ]
    )
    # Half a bf16 step, and a little of float32: the output's own rounding is all there is.
    torch.testing.assert_close(output.float(), expected, rtol=2**-8, atol=2e-6)


def _counts(shape: RegionShape | None) -> list[int]:
    if shape is None:
        return [0, 0, 0]
    return [shape.num_key_entries, shape.num_value_entries, shape.num_tokens]


SIZES = (
    (1, 1, 1, (1, 1)),
    (33, 31, 1, (7, 9)),
    (511, 32, 2, (100, 130)),
    (2049, 33, 3, (301, 57)),
    (2700, 75, 1, (450, 501)),
)
"""Tokens, tail, query tokens, entries: odd, tiles of the softmax crossed, several tails."""


@pytest.mark.parametrize("head_size", [32, 64, 128])
@pytest.mark.parametrize("group", [1, 4])
def test_equals_the_oracle(head_size: int, group: int) -> None:
    """With vLLM's own table of a bf16 model."""
    torch.manual_seed(head_size + group)
    for num_tokens, num_tail, num_queries, entries in SIZES:
        row = _row(num_tokens, num_tail, num_queries, 2, group, head_size, entries, 32)
        _check([row], 32)


@pytest.mark.parametrize("why", ["table of float32", "no such products"])
def test_equals_the_oracle_without_products_of_bf16(why: str, monkeypatch) -> None:
    """The way for other processors and tables."""
    torch.manual_seed(9)
    if why == "no such products":
        monkeypatch.setattr(decode, "HAS_BF16_PRODUCTS", False)
    dtype = torch.float32 if why == "table of float32" else torch.bfloat16
    for num_tokens, num_tail, num_queries, entries in SIZES:
        row = _row(num_tokens, num_tail, num_queries, 2, 4, 64, entries, 32)
        _check([row], 32, table_dtype=dtype)


@pytest.mark.skipif(not decode.HAS_BF16_PRODUCTS, reason="a processor without AVX512_BF16")
def test_products_of_bf16_only_where_exact() -> None:
    """A table that bf16 cannot hold, or a head of an odd number of vectors, stays float32."""
    assert turning_table(_cos_sin(64).bfloat16()).dtype == np.uint16
    assert turning_table(_cos_sin(64).bfloat16().float()).dtype == np.uint16
    assert turning_table(_cos_sin(64)).dtype == np.float32
    assert turning_table(_cos_sin(80).bfloat16()).dtype == np.float32


def test_capacity_of_one() -> None:
    """All keys in one entry, and all values: positions and norms are what is left."""
    torch.manual_seed(1)
    _check([_row(700, 5, 1, 2, 4, 64, (1, 1), 32)], 32)


@pytest.mark.parametrize("counts", [(0, 700), (1, 511), (512, 699), (513, 0)])
def test_empty_slots_are_not_attended(counts: tuple[int, int]) -> None:
    """Heads that hold fewer tokens than there are slots, or none."""
    torch.manual_seed(7)
    _check([_row(700, 5, 1, 2, 4, 64, (20, 30), 32, counts)], 32)


def test_rows_of_a_batch() -> None:
    """Rows of different sizes, one without a region, in one step; more rows than query heads."""
    torch.manual_seed(2)
    sizes = ((90, 40, 1), (0, 65, 2), (300, 1, 1), (17, 20, 3))
    rows = [_row(n, t, q, 2, 4, 64, (11, 13), 32) for n, t, q in sizes]
    _check(rows, 32)


def test_a_dense_prefix_is_attended() -> None:
    """Blocks before the region, in some rows of a batch, and in one without a region."""
    torch.manual_seed(8)
    sizes = ((90, 40, 1, 64), (0, 65, 2, 32), (300, 1, 1, 0))
    rows = [_row(n, t, q, 2, 4, 64, (11, 13), 32, num_prefix=p) for n, t, q, p in sizes]
    _check(rows, 32)


@pytest.mark.parametrize(("group", "head_size"), [(3, 32), (13, 80)])
def test_odd_groups(group: int, head_size: int) -> None:
    """Groups that are no power of two, or need two passes with an idle lane; half of D odd."""
    torch.manual_seed(group)
    _check([_row(100, 20, 1, 1, group, head_size, (20, 30), 32)], 32)


def test_lanes_cover_the_group() -> None:
    """A pass has at most eight query heads, and no pass is empty."""
    assert [num_lanes(group) for group in (1, 4, 7, 8, 9, 12, 16)] == [1, 4, 7, 8, 5, 6, 8]


def test_indexed_packing() -> None:
    """A packing that no strides describe, such as AMX's, read through index tables."""
    torch.manual_seed(4)
    places = torch.randperm(2 * 32 * 64)
    index = places[: 32 * 64].view(32, 64), places[32 * 64 :].view(32, 64)
    _check([_row(50, 45, 2, 2, 4, 64, (9, 9), 32)], 32, index=index)


def test_large_logits() -> None:
    """Norms that push a softmax far into one token, first or last in the order, stay exact."""
    torch.manual_seed(5)
    for token in (0, 2399):
        row = _row(2400, 3, 1, 1, 4, 64, (300, 200), 32)
        for book in row.books[0]:
            book.norms[token] = 2000.0
        _check([row], 32)


def test_threads_change_nothing() -> None:
    """The parallel kernel gives what the serial one gives."""
    torch.manual_seed(6)
    rows = [_row(60, 9, 1, 2, 4, 64, (9, 9), 32) for _ in range(2)]
    _check(rows, 32, num_threads=2)


def test_refusals() -> None:
    """Head sizes and tensors that the kernel does not know are refused."""
    with pytest.raises(ValueError, match="multiple of 16"):
        RegionDecoder(torch.zeros(10, 40), 1.0)
    decoder = RegionDecoder(torch.zeros(10, 32), 1.0)
    rows = DecodeRows.of([[0]], [[0, 0]], [[0, 0, 0]], [1], [0, 1])
    query = torch.zeros(1, 1, 32)
    with pytest.raises(ValueError, match="bfloat16"):
        decoder(query, query, torch.zeros(1, 1, 32, 64).bfloat16(), rows)
