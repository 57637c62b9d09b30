"""The codebook: against plain loops, and on vectors whose cover is known."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

import oracles_codebook as oracles
from vllm_spindle.core.codebook import (
    Book,
    Codebook,
    cover_heads,
    greedy_cover,
    reconstruct,
    windowed_cover,
)
from vllm_spindle.core.codebook_bytes import dense_bytes, paper_ratio, true_bytes
from vllm_spindle.core.reference import attend_codebook, attend_reduced
from vllm_spindle.core.rotary import unrotate_keys


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _at(*degrees: float, norm: float = 1.0) -> Tensor:
    """Vectors in the plane at these angles. [N, 2]."""
    radians = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return (norm * torch.stack([radians.cos(), radians.sin()], dim=-1)).float()


def _assert_is(codebook: Codebook, expected: oracles.Cover, vectors: Tensor) -> None:
    assert codebook.codes.tolist() == expected.codes
    directions = vectors / vectors.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(codebook.entries, directions[expected.members])


@pytest.mark.parametrize("window", [1, 7, 20, 40, 99])
def test_cover_equals_the_loop(window: int) -> None:
    """Members and codes are the definition's, with any window."""
    vectors = _randn(40, 3)
    codebook = windowed_cover(vectors, 0.8, window)
    _assert_is(codebook, oracles.cover(vectors, 0.8, window), vectors)


def test_the_highest_degree_comes_first() -> None:
    """The middle of three neighbours covers all; its ends, each short of one, are no entries."""
    vectors = _at(0, 20, 40, norm=3.0)
    codebook = greedy_cover(vectors, math.cos(math.radians(30)))
    torch.testing.assert_close(codebook.entries, _at(20))
    assert codebook.codes.tolist() == [0, 0, 0]
    expected = torch.tensor([20, 0, 20]).deg2rad().cos()
    torch.testing.assert_close(codebook.similarity, expected)


def test_degrees_count_the_uncovered_only() -> None:
    """A chosen entry's neighbours no longer speak for others.

    Everyone is similar to the next, 10 degrees on. 10, the first of degree 3, covers 0 to 20;
    30 has then lost a neighbour, so that 40 is the first of degree 3.
    """
    vectors = _at(0, 10, 20, 30, 40, 50, 60, 70)
    codebook = greedy_cover(vectors, math.cos(math.radians(15)))
    torch.testing.assert_close(codebook.entries, _at(10, 40, 60))
    assert codebook.codes.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_equal_degrees_go_to_the_lowest_index() -> None:
    """Of two alike, the first is the entry."""
    codebook = greedy_cover(_at(5, 90, 0, 95), 0.98)
    torch.testing.assert_close(codebook.entries, _at(5, 90))


def test_identical_vectors_are_one_entry() -> None:
    """N times a direction, whatever the lengths: one entry, every length kept."""
    lengths = torch.tensor([0.5, 2.0, 1e-3, 7e4])
    vectors = lengths[:, None] * _randn(16)
    codebook = greedy_cover(vectors, 0.98)
    assert codebook.entries.shape == (1, 16)
    torch.testing.assert_close(reconstruct(codebook), vectors)


def test_orthogonal_vectors_are_all_entries() -> None:
    """Nothing alike, nothing merged, nothing lost."""
    codebook = greedy_cover(3 * torch.eye(6), 0.1)
    assert codebook.codes.tolist() == list(range(6))
    assert torch.equal(reconstruct(codebook), 3 * torch.eye(6))


@pytest.mark.parametrize("window", [64, 10])
def test_threshold_one_is_exact(window: int) -> None:
    """At 1 even copies stay apart, and reconstruction is the vector to float rounding."""
    vectors = _randn(32, 8).repeat(2, 1)
    codebook = windowed_cover(vectors, 1.0, window)
    assert codebook.codes.tolist() == list(range(64))
    torch.testing.assert_close(reconstruct(codebook), vectors, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window", [5, 2])
def test_zero_vectors_take_no_entry(window: int) -> None:
    """A zero vector is any entry times zero: exact, and never one itself."""
    vectors = torch.cat([torch.zeros(2, 4), torch.eye(4)[:2], torch.zeros(1, 4)])
    codebook = windowed_cover(vectors, 0.9, window)
    assert torch.equal(codebook.entries, torch.eye(4)[:2])
    assert torch.equal(reconstruct(codebook), vectors)
    assert torch.equal(codebook.similarity, torch.ones(5))


def test_only_zero_vectors() -> None:
    """Zeros alone come back as zeros, from a single entry."""
    codebook = greedy_cover(torch.zeros(3, 4), 0.9)
    assert codebook.entries.shape == (1, 4)
    assert torch.equal(reconstruct(codebook), torch.zeros(3, 4))


def test_who_is_left_without_room_has_no_code() -> None:
    """With room for two of four directions, the two that speak for most are in."""
    book = Book(_at(0, 1, 90, 91, 30, 70), 0.98, capacity=2)
    assert book.add(torch.arange(6)).tolist() == [0, 1, 2, 3]
    assert book.codes.tolist() == [0, 0, 1, 1, -1, -1]


def test_parts_are_matched_before_they_are_covered() -> None:
    """A later part takes the entries there are, and the room that is left."""
    book = Book(_at(0, 90, 1, 45, 135), 0.98, capacity=3)
    book.add(torch.tensor([0, 1]))
    assert book.add(torch.tensor([2, 3, 4])).tolist() == [2, 3]
    assert book.codes.tolist() == [0, 1, 0, 2, -1]


def test_no_vectors() -> None:
    """Nothing merges to nothing."""
    codebook = greedy_cover(torch.zeros(0, 4), 0.9)
    assert codebook.entries.shape == reconstruct(codebook).shape == (0, 4)
    (codebook,) = cover_heads(torch.zeros(2, 0, 4), "layer", 0.9)
    assert codebook.codes.shape == (0,)


@pytest.mark.parametrize("scope", ["head", "kv-group", "layer"])
def test_scope_says_who_shares(scope: str) -> None:
    """Two kv heads with two copies each, of directions that all heads have in common."""
    base = _randn(5, 16)
    vectors = base.expand(2, 2, 5, 16) * torch.tensor([1.0, 2, 3, 4]).view(2, 2, 1, 1)
    codebooks = cover_heads(vectors, scope, 0.98)
    assert len(codebooks) == {"head": 4, "kv-group": 2, "layer": 1}[scope]
    assert all(len(codebook.entries) == 5 for codebook in codebooks)
    codes = torch.cat([codebook.codes for codebook in codebooks]).view(2, 2, 5)
    assert torch.equal(codes, torch.arange(5).expand(2, 2, 5))
    remembered = torch.cat([reconstruct(codebook) for codebook in codebooks]).view(vectors.shape)
    torch.testing.assert_close(remembered, vectors)


def test_a_scopes_window_holds_all_heads_of_its_tokens() -> None:
    """Two heads' tokens come in together: the first window of two tokens sees four vectors."""
    vectors = torch.eye(8).view(2, 4, 8)
    (codebook,) = cover_heads(vectors, "layer", 0.5, window=2)
    # Token by token: 0 4 1 5 | 2 6 3 7.
    assert codebook.entries.argmax(dim=-1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_unknown_scope_is_refused() -> None:
    """A scope that does not exist is refused, and the ones that do are named."""
    with pytest.raises(ValueError, match="head, kv-group or layer, got 'model'"):
        cover_heads(_randn(1, 2, 4), "model", 0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), r"threshold must be in \(0, 1\], got 0.0"),
        ((1.1,), r"threshold must be in \(0, 1\], got 1.1"),
        ((0.9, 0), "capacity must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: tuple, message: str) -> None:
    """Each refusal names the argument, its range and the value."""
    with pytest.raises(ValueError, match=message):
        Book(_randn(3, 4), *arguments)


def test_paper_ratio_is_equation_15() -> None:
    """r2 = 0.3 with int32 and d_h = 128 and nothing evicted: 0.3 * 1.0234."""
    ratio = paper_ratio(
        num_tokens=1000,
        num_kept=1000,
        num_key_entries=200,
        num_value_entries=400,
        head_size=128,
        index_bits=32,
    )
    assert ratio == Fraction(3, 10) * Fraction(131, 128)


def test_true_bytes_charges_every_kept_vector() -> None:
    """r1 (r2 + (index + norm + position) / d_h) of the dense bytes, in units of an element."""
    counts = dict(num_kept=500, num_key_entries=100, num_value_entries=200, head_size=64)
    dense = dense_bytes(1000, 64)
    assert dense == 1000 * 2 * 64 * 2
    assert Fraction(true_bytes(**counts, implied_positions=True), dense) == Fraction(1, 2) * (
        Fraction(300, 1000) + Fraction(2, 64)
    )
    # An int32 position for a token's key and value: one element's worth for each.
    assert Fraction(true_bytes(**counts), dense) == Fraction(1, 2) * (
        Fraction(300, 1000) + Fraction(3, 64)
    )


NUM_KV_HEADS, GROUP, NUM_CONTEXT, NUM_TAIL, NUM_QUERIES, HEAD_SIZE = 2, 2, 10, 5, 3, 8
TABLE = oracles.cos_sin_table(64, HEAD_SIZE)


@pytest.fixture
def attended() -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the last three of fifteen tokens, and all rotated keys and values."""
    return (
        _randn(NUM_QUERIES, NUM_KV_HEADS * GROUP, HEAD_SIZE, seed=1),
        _randn(NUM_CONTEXT + NUM_TAIL, NUM_KV_HEADS, HEAD_SIZE, seed=2),
        _randn(NUM_CONTEXT + NUM_TAIL, NUM_KV_HEADS, HEAD_SIZE, seed=3),
    )


def _gather(tokens: Tensor, kept: Tensor) -> Tensor:
    """Context rows per (kv head, kept). tokens [T, K, D], kept [K, ..., N] -> [K, ..., N, D]."""
    return torch.stack([tokens[positions, head] for head, positions in enumerate(kept)])


@pytest.mark.parametrize("scope", ["head", "kv-group", "layer"])
@pytest.mark.parametrize("shape", ["shared", "unfold"])
def test_attention_without_merging_is_attention_over_the_kept(
    attended: tuple[Tensor, Tensor, Tensor], scope: str, shape: str
) -> None:
    """At threshold 1 the codebook's attention is that of the reduced cache, in every scope."""
    queries, keys, values = attended
    kept = torch.tensor([[[0, 3, 6, 9], [1, 2, 3, 8]], [[2, 5, 6, 7], [0, 4, 8, 9]]])
    kept = kept[:, 0] if shape == "shared" else kept
    bare = unrotate_keys(_gather(keys, kept), kept, TABLE)
    outputs = attend_codebook(
        queries,
        cover_heads(bare, scope, 1.0),
        cover_heads(_gather(values, kept), scope, 1.0),
        kept,
        keys[NUM_CONTEXT:],
        values[NUM_CONTEXT:],
        TABLE,
        scale=0.3,
    )
    expected = attend_reduced(queries, keys, values, kept, num_context=NUM_CONTEXT, scale=0.3)
    torch.testing.assert_close(outputs, expected)


def test_merged_attention_equals_a_loop(attended: tuple[Tensor, Tensor, Tensor]) -> None:
    """Entry times norm, turned to its token's place, then one softmax with the tail."""
    queries, keys, values = attended
    kept = torch.tensor([[0, 3, 6, 9], [1, 2, 5, 8]])
    bare = unrotate_keys(_gather(keys, kept), kept, TABLE)
    key_books = cover_heads(bare, "head", 0.3)
    value_books = cover_heads(_gather(values, kept), "layer", 0.3)
    tail = (keys[NUM_CONTEXT:], values[NUM_CONTEXT:])
    outputs = attend_codebook(queries, key_books, value_books, kept, *tail, TABLE, scale=0.3)
    for head in range(NUM_KV_HEADS * GROUP):
        kv_head = head // GROUP
        own = key_books[kv_head]
        merged_keys = [
            oracles.rotate(own.norms[n] * own.entries[own.codes[n]], int(kept[kv_head, n]))
            for n in range(4)
        ]
        shared, first = value_books[0], 4 * kv_head
        merged_values = [
            shared.norms[first + n] * shared.entries[shared.codes[first + n]] for n in range(4)
        ]
        for row in range(NUM_QUERIES):
            seen = NUM_TAIL - NUM_QUERIES + row + 1
            all_keys = torch.stack([*merged_keys, *tail[0][:seen, kv_head]])
            all_values = torch.stack([*merged_values, *tail[1][:seen, kv_head]])
            expected = oracles.attention(queries[row, head], all_keys, all_values, 0.3)
            torch.testing.assert_close(outputs[row, head], expected)


def test_entries_as_stored_are_attended_in_float32() -> None:
    """A codebook rounded to bfloat16 entries and float16 norms is read in float32."""
    codebook = greedy_cover(_randn(20, 8), 0.9)
    stored = replace(codebook, entries=codebook.entries.bfloat16(), norms=codebook.norms.half())
    remembered = reconstruct(stored)
    assert remembered.dtype == torch.float32
    expected = stored.entries.float()[stored.codes] * stored.norms.float()[:, None]
    assert torch.equal(remembered, expected)
