"""What holds for every choice of kept tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracles
from vllm_spindle.core.eviction import gather_kept, select_kept


@st.composite
def choices(draw: st.DrawFn, max_group: int = 5, with_ties: bool = False) -> tuple[Tensor, int]:
    """Scores [K, G, C], distinct within a head unless ties are asked for, and a budget N."""
    num_kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, max_group))
    num_context = draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    noise = torch.rand(num_kv_heads, group, num_context, generator=generator)
    scores = noise.argsort(dim=-1).float()
    if with_ties:
        scores = scores // draw(st.integers(1, 30))
    return scores, draw(st.integers(0, num_context))


@given(choices())
def test_union_equals_the_oracle(choice: tuple[Tensor, int]) -> None:
    """The union is what heads taking turns choose."""
    scores, num_kept = choice
    assert select_kept(scores, num_kept, "union").tolist() == oracles.union_by_rank(
        scores, num_kept
    )


@given(choices())
def test_union_holds_each_heads_favourites(choice: tuple[Tensor, int]) -> None:
    """With room for r rounds of G turns, each head's r best tokens are in."""
    scores, num_kept = choice
    rounds = num_kept // scores.shape[1]
    best = scores.topk(rounds, dim=-1).indices
    kept = select_kept(scores, num_kept, "union")
    for kv_head, kept_of_head in enumerate(kept.tolist()):
        assert set(best[kv_head].flatten().tolist()) <= set(kept_of_head)


@pytest.mark.parametrize("gqa", ["union", "mean", "unfold"])
@given(choices(with_ties=True))
def test_kept_positions_are_distinct_and_ascending(gqa: str, choice: tuple[Tensor, int]) -> None:
    """Exactly N distinct positions of the context, in order, ties or not."""
    scores, num_kept = choice
    kept = select_kept(scores, num_kept, gqa)
    shape = scores.shape[:2] if gqa == "unfold" else scores.shape[:1]
    assert kept.shape == (*shape, num_kept)
    assert bool((kept[..., 1:] > kept[..., :-1]).all())
    assert bool(((kept >= 0) & (kept < scores.shape[2])).all())


@pytest.mark.parametrize("gqa", ["union", "mean", "unfold"])
@given(choices(max_group=1))
def test_a_group_of_one_keeps_the_top_scored(gqa: str, choice: tuple[Tensor, int]) -> None:
    """Without grouping every mode is the plain top-k."""
    scores, num_kept = choice
    expected = [oracles.top(head[0], num_kept) for head in scores.tolist()]
    assert select_kept(scores, num_kept, gqa).flatten(1).tolist() == expected


@pytest.mark.parametrize("gqa", ["mean", "unfold"])
@given(choices(with_ties=True))
def test_nothing_evicted_outscores_what_is_kept(gqa: str, choice: tuple[Tensor, int]) -> None:
    """By its own measure, no mode evicts a token that scores above a kept one."""
    scores, num_kept = choice
    measure = scores.mean(dim=1) if gqa == "mean" else scores
    kept = select_kept(scores, num_kept, gqa)
    is_kept = torch.zeros(measure.shape, dtype=torch.bool).scatter_(-1, kept, True)
    worst_kept = measure.masked_fill(~is_kept, float("inf")).amin(dim=-1)
    best_evicted = measure.masked_fill(is_kept, float("-inf")).amax(dim=-1)
    assert bool((worst_kept >= best_evicted).all())


@given(choices())
def test_a_larger_budget_evicts_nothing_kept(choice: tuple[Tensor, int]) -> None:
    """The union at N - 1 lies within the union at N."""
    scores, num_kept = choice
    smaller = select_kept(scores, max(0, num_kept - 1), "union").tolist()
    larger = select_kept(scores, num_kept, "union").tolist()
    assert all(set(s) <= set(b) for s, b in zip(smaller, larger, strict=True))


@given(choices())
def test_gathering_keeps_rows_whole(choice: tuple[Tensor, int]) -> None:
    """Gathered rows are the kept tokens' own, head by head."""
    scores, num_kept = choice
    kept = select_kept(scores, num_kept, "union")
    heads = torch.arange(scores.shape[0]).view(-1, 1, 1).expand(-1, scores.shape[2], -1)
    positions = torch.arange(scores.shape[2]).view(1, -1, 1).expand(scores.shape[0], -1, -1)
    gathered = gather_kept(torch.cat([heads, positions], dim=-1), kept)
    assert torch.equal(gathered[..., 1], kept)
    assert torch.equal(gathered[..., 0], heads[:, :num_kept, 0])
