"""What holds for every codebook."""

import math
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracles_codebook as oracles
from vllm_spindle.core.codebook import cover_heads, greedy_cover, reconstruct, windowed_cover
from vllm_spindle.core.codebook_bytes import paper_ratio, true_bytes
from vllm_spindle.core.reference import attend_codebook, attend_reduced
from vllm_spindle.core.rotary import rotate_keys, unrotate_keys

NUM_POSITIONS = 64


@dataclass(frozen=True)
class Case:
    """Vectors [N, D] around a few directions, and how to cover them."""

    vectors: Tensor
    threshold: float
    window: int


@st.composite
def cases(draw: st.DrawFn, min_tokens: int = 1) -> Case:
    """Up to 30 vectors in up to 6 dimensions, from identical to unrelated."""
    num_vectors, head_size = draw(st.integers(min_tokens, 30)), draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    centres = torch.randn(draw(st.integers(1, 8)), head_size, generator=generator)
    which = torch.randint(len(centres), (num_vectors,), generator=generator)
    noise = torch.randn(num_vectors, head_size, generator=generator)
    lengths = torch.rand(num_vectors, 1, generator=generator) + 0.1
    return Case(
        lengths * (centres[which] + draw(st.sampled_from([0.05, 0.2, 1.0])) * noise),
        draw(st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.98])),
        draw(st.integers(1, 35)),
    )


@settings(max_examples=200)
@given(cases())
def test_the_cover_equals_the_oracle(case: Case) -> None:
    """Members and codes are those of the plain loops."""
    codebook = windowed_cover(case.vectors, case.threshold, case.window)
    expected = oracles.cover(case.vectors, case.threshold, case.window)
    assert codebook.codes.tolist() == expected.codes
    directions = case.vectors / case.vectors.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(codebook.entries, directions[expected.members])


@given(cases())
def test_one_window_is_the_full_cover(case: Case) -> None:
    """A window of all vectors, or more, is no window."""
    full = greedy_cover(case.vectors, case.threshold)
    for window in (len(case.vectors), len(case.vectors) + case.window):
        codebook = windowed_cover(case.vectors, case.threshold, window)
        assert torch.equal(codebook.entries, full.entries)
        assert torch.equal(codebook.codes, full.codes)


@given(cases())
def test_the_error_is_bounded_by_the_threshold(case: Case) -> None:
    """No vector moves by more than sqrt(2 (1 - threshold)) of its length."""
    codebook = windowed_cover(case.vectors, case.threshold, case.window)
    error = (reconstruct(codebook) - case.vectors).norm(dim=-1)
    bound = math.sqrt(2 * (1 - case.threshold)) * case.vectors.norm(dim=-1)
    assert bool((error <= bound * (1 + 1e-4)).all())


@given(cases())
def test_similarity_tells_the_error(case: Case) -> None:
    """Each vector's error is sqrt(2 (1 - similarity)) of its length."""
    codebook = windowed_cover(case.vectors, case.threshold, case.window)
    error = (reconstruct(codebook) - case.vectors).norm(dim=-1) / case.vectors.norm(dim=-1)
    expected = (2 * (1 - codebook.similarity)).sqrt()
    torch.testing.assert_close(error, expected, rtol=0, atol=2e-3)


@given(cases())
def test_lengths_survive(case: Case) -> None:
    """A reconstructed vector is as long as the vector was, whatever its entry."""
    codebook = windowed_cover(case.vectors, case.threshold, case.window)
    torch.testing.assert_close(reconstruct(codebook).norm(dim=-1), case.vectors.norm(dim=-1))


@given(cases(), st.floats(1e-3, 1e3))
def test_lengths_decide_nothing(case: Case, factor: float) -> None:
    """Longer or shorter vectors of the same directions have the same codes."""
    lengths = torch.linspace(1, factor, len(case.vectors)).unsqueeze(-1)
    before = windowed_cover(case.vectors, case.threshold, case.window)
    after = windowed_cover(lengths * case.vectors, case.threshold, case.window)
    assert torch.equal(before.codes, after.codes)


@given(cases(), st.integers(2, 4))
def test_unfolded_copies_cost_no_entry(case: Case, group: int) -> None:
    """A copy per query head gives the kv head's own entries, in the same order."""
    folded = cover_heads(case.vectors[None], "kv-group", case.threshold)
    copies = case.vectors[None, None].expand(1, group, -1, -1)
    unfolded = cover_heads(copies, "kv-group", case.threshold)
    assert torch.equal(unfolded[0].entries, folded[0].entries)
    assert torch.equal(unfolded[0].codes, folded[0].codes.repeat(group))
    # Each to itself, the copies cost their entries again.
    alone = cover_heads(copies, "head", case.threshold)
    assert sum(len(codebook.entries) for codebook in alone) == group * len(folded[0].entries)


@given(cases())
def test_a_shared_table_serves_each_head(case: Case) -> None:
    """With one table for two unlike heads, each head's own vectors come back within the bound."""
    heads = torch.stack([case.vectors, -2 * case.vectors.flip(0)])
    (shared,) = cover_heads(heads, "layer", case.threshold, window=case.window)
    error = (reconstruct(shared).view(heads.shape) - heads).norm(dim=-1)
    bound = math.sqrt(2 * (1 - case.threshold)) * heads.norm(dim=-1)
    assert bool((error <= bound * (1 + 1e-4)).all())


@given(cases(), st.integers(0, 2**31))
def test_a_rotation_comes_undone(case: Case, seed: int) -> None:
    """Un-rotating a rotated key gives the key, at any position, to float rounding."""
    keys = case.vectors[:, : case.vectors.shape[1] // 2 * 2]
    table = oracles.cos_sin_table(NUM_POSITIONS, keys.shape[1])
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(NUM_POSITIONS, keys.shape[:1], generator=generator)
    rotated = rotate_keys(keys, positions, table)
    torch.testing.assert_close(rotated.norm(dim=-1), keys.norm(dim=-1))
    torch.testing.assert_close(unrotate_keys(rotated, positions, table), keys, rtol=0, atol=1e-5)


@st.composite
def attention_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Queries [Q, H, D], keys and values [T, K, D], kept [K, N], C context tokens."""
    num_kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    num_queries, num_context = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    num_tokens = num_context + num_queries + draw(st.integers(0, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    noise = torch.rand(num_kv_heads, num_context, generator=generator)
    return (
        torch.randn(num_queries, num_kv_heads * group, 8, generator=generator),
        torch.randn(num_tokens, num_kv_heads, 8, generator=generator),
        torch.randn(num_tokens, num_kv_heads, 8, generator=generator),
        noise.argsort(dim=-1)[:, : draw(st.integers(1, num_context))],
        num_context,
    )


@given(attention_cases(), st.sampled_from(["head", "kv-group", "layer"]))
def test_attention_without_merging_is_attention_over_the_kept(
    case: tuple[Tensor, Tensor, Tensor, Tensor, int], scope: str
) -> None:
    """Threshold 1: the codebook's attention equals the reduced cache's."""
    queries, keys, values, kept, num_context = case
    table = oracles.cos_sin_table(NUM_POSITIONS, 8)
    heads = torch.arange(len(kept)).unsqueeze(-1)
    bare = unrotate_keys(keys[kept, heads], kept, table)
    outputs = attend_codebook(
        queries,
        cover_heads(bare, scope, 1.0),
        cover_heads(values[kept, heads], scope, 1.0),
        kept,
        keys[num_context:],
        values[num_context:],
        table,
        scale=0.35,
    )
    expected = attend_reduced(queries, keys, values, kept, num_context=num_context, scale=0.35)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 500), st.data())
def test_the_paper_charges_less_than_it_costs(num_kept: int, data: st.DataObject) -> None:
    """Entries may be no more than vectors, so charging per entry never charges more."""
    entries = st.integers(1, num_kept)
    counts = dict(
        num_kept=num_kept,
        num_key_entries=data.draw(entries),
        num_value_entries=data.draw(entries),
        head_size=64,
    )
    paper = paper_ratio(num_tokens=500, **counts) * 500 * 2 * 64 * 2
    assert paper <= true_bytes(**counts, implied_positions=True) < true_bytes(**counts)
