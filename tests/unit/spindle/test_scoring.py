"""Importance of cached tokens: against plain loops."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
from vllm_spindle.core import scoring
from vllm_spindle.core.scoring import (
    in_turns,
    paper_importance,
    pooled_importance,
    random_importance,
    received_attention,
    window_attention,
)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("num_kv_heads", "group", "window", "num_tokens"),
    [(1, 1, 1, 1), (2, 3, 4, 9), (3, 1, 5, 5), (1, 4, 1, 7)],
)
def test_window_attention_equals_the_loop(
    num_kv_heads: int, group: int, window: int, num_tokens: int
) -> None:
    """Summed window attention equals one softmax per query and head."""
    queries = _random(num_kv_heads, group, window, 6)
    keys = _random(num_kv_heads, num_tokens, 6, seed=1)
    expected = oracles.window_attention(queries, keys, 6**-0.5)
    torch.testing.assert_close(window_attention(queries, keys, 6**-0.5), expected)


def test_window_attention_is_causal_within_the_window() -> None:
    """Equal keys: the last of four tokens gets only the last query's quarter."""
    attention = window_attention(torch.ones(1, 1, 2, 4), torch.ones(1, 4, 4), 0.5)
    torch.testing.assert_close(attention[0, 0], torch.tensor([7, 7, 7, 3]) / 12)


def test_window_attention_scores_in_float32() -> None:
    """Half-precision queries and keys are multiplied as float32, not rounded on the way."""
    queries, keys = _random(1, 2, 3, 8).bfloat16(), _random(1, 9, 8, seed=1).bfloat16()
    attention = window_attention(queries, keys, 0.3)
    assert attention.dtype == torch.float32
    torch.testing.assert_close(attention, window_attention(queries.float(), keys.float(), 0.3))


def test_window_attention_refuses_a_window_longer_than_the_tokens() -> None:
    """More window queries than tokens is refused with both counts."""
    with pytest.raises(ValueError, match="window of 3 queries over 2 tokens"):
        window_attention(torch.ones(1, 1, 3, 4), torch.ones(1, 2, 4), 0.5)


@pytest.mark.parametrize("pool_kernel", [1, 3, 5, 31])
@pytest.mark.parametrize("num_context", [1, 4, 9])
def test_pooled_importance_equals_the_loop(pool_kernel: int, num_context: int) -> None:
    """Each score is the largest among its neighbours in the context."""
    attention = _random(2, 3, 11).exp()
    expected = oracles.pooled_importance(attention, num_context, pool_kernel)
    scores = pooled_importance(attention, num_context, pool_kernel=pool_kernel)
    assert torch.equal(scores, expected)


def test_pooled_importance_ignores_the_window() -> None:
    """A large score just behind the context does not leak into it."""
    attention = torch.tensor([[[1.0, 2.0, 3.0, 100.0]]])
    assert pooled_importance(attention, 3, pool_kernel=3).tolist() == [[[2.0, 3.0, 3.0]]]


@pytest.mark.parametrize("pool_kernel", [0, -1, 4])
def test_pooled_importance_refuses_even_kernels(pool_kernel: int) -> None:
    """An even or non-positive kernel is refused with its value."""
    with pytest.raises(ValueError, match=f"pool_kernel .* got {pool_kernel}"):
        pooled_importance(torch.ones(1, 1, 4), 4, pool_kernel=pool_kernel)


@pytest.mark.parametrize("reduction", ["sum", "max"])
@pytest.mark.parametrize(("stride", "min_distance"), [(1, 0), (1, 3), (3, 0), (2, 4)])
def test_received_attention_equals_the_loop(
    monkeypatch: pytest.MonkeyPatch, reduction: Any, stride: int, min_distance: int
) -> None:
    """A softmax per query; what is too near takes its part of it and does not count."""
    monkeypatch.setitem(scoring.MOST_AT_ONCE, "cpu", 3 * 2 * 3 * 9)
    queries, keys = 2 * _random(2, 3, 9, 6), _random(2, 9, 6, seed=1)
    expected = torch.zeros(2, 3, 9)
    for k, g, b in itertools.product(range(2), range(3), range(1, 9, stride)):
        row = torch.softmax(keys[k, : b + 1] @ queries[k, g, b] * 0.4, dim=0)
        for a in range(b + 1 - min_distance if min_distance else b + 1):
            before = float(expected[k, g, a])
            expected[k, g, a] = before + row[a] if reduction == "sum" else max(before, row[a])
    found = received_attention(
        queries[:, :, 1::stride],
        keys,
        0.4,
        positions=torch.arange(1, 9, stride),
        min_distance=min_distance,
        reduction=reduction,
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduction", ["sum", "max"])
def test_received_attention_comes_in_chunks(reduction: Any) -> None:
    """Chunks over the keys so far give what the whole gives."""
    queries, keys = _random(2, 2, 11, 6), _random(2, 11, 6, seed=1)
    dials = {"min_distance": 2, "reduction": reduction}
    whole = received_attention(queries, keys, 0.4, positions=torch.arange(11), **dials)
    joined = torch.zeros(2, 2, 11)
    for first, stop in ((0, 4), (4, 5), (5, 11)):
        part = received_attention(
            queries[:, :, first:stop],
            keys[:, :stop],
            0.4,
            positions=torch.arange(first, stop),
            **dials,
        )
        part = torch.nn.functional.pad(part, (0, 11 - stop))
        joined = joined + part if reduction == "sum" else torch.maximum(joined, part)
    torch.testing.assert_close(joined, whole)


def test_received_attention_weighs_queries_and_looks_back_on_everything() -> None:
    """Weights multiply; queries behind all tokens see all of them."""
    queries, keys = _random(1, 1, 2, 4), _random(1, 5, 4, seed=1)
    rows = torch.softmax(queries[0, 0] @ keys[0].T * 0.5, dim=-1)
    found = received_attention(
        queries, keys, 0.5, positions=torch.arange(5, 7), weights=torch.tensor([2.0, 0.5])
    )
    torch.testing.assert_close(found[0, 0], 2 * rows[0] + 0.5 * rows[1])


@pytest.mark.parametrize("num_context", [1, 6, 9])
def test_paper_importance_equals_the_loop(num_context: int) -> None:
    """Each score is the attention over l - a."""
    attention = _random(2, 3, 9).exp()
    expected = oracles.paper_importance(attention, num_context)
    torch.testing.assert_close(paper_importance(attention, num_context), expected)


def test_paper_importance_favours_the_recent() -> None:
    """Equal attention over four tokens: the divisors are 4, 3 and 2."""
    scores = paper_importance(torch.full((1, 1, 4), 12.0), 3)
    assert scores.tolist() == [[[3.0, 4.0, 6.0]]]


def test_random_importance_depends_on_the_seed_alone() -> None:
    """The same seed gives the same scores, another seed others, whatever ran before."""
    first = random_importance(2, 3, 50, seed=1, device="cpu")
    torch.rand(7)
    assert torch.equal(first, random_importance(2, 3, 50, seed=1, device="cpu"))
    assert not torch.equal(first, random_importance(2, 3, 50, seed=2, device="cpu"))
    assert first.shape == (2, 3, 50)
    assert not torch.equal(first[0, 0], first[0, 1])


def test_two_scores_take_turns() -> None:
    """The first one's best, the second one's best, and so on; who is in already is passed over."""
    first = torch.tensor([9.0, 8, 7, 6, 0, 0, 0, 0])
    second = torch.tensor([0.0, 9, 0, 0, 8, 7, 6, 0])
    order = in_turns(first, second).argsort(descending=True).tolist()
    # Turns: 0 | 1 | 1 again | 4 | 2 | 5 | 3 | 6, and 7, which nobody wants, last.
    assert order == [0, 1, 4, 2, 5, 3, 6, 7]


def test_any_seed_draws() -> None:
    """Also one of 60 bits, a time in nanoseconds, once layers and prompts have multiplied it."""
    seeds = [7, 2**60, (2**60 * 1009 + 3) * 65537 + 500, -5]
    drawn = [random_importance(1, 1, 8, seed=seed, device="cpu") for seed in seeds]
    assert len({tuple(each.flatten().tolist()) for each in drawn}) == len(seeds)
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(drawn[0], torch.rand(1, 1, 8, generator=generator))
