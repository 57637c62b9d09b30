"""What holds for every importance."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vllm_spindle.core.scoring import pooled_importance, window_attention

SEEDS = st.integers(0, 2**31)


@st.composite
def windows(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Queries of a window [K, G, W, D] and the keys of all tokens [K, T, D]."""
    num_kv_heads, group, window = (draw(st.integers(1, n)) for n in (3, 4, 6))
    num_tokens = window + draw(st.integers(0, 20))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    queries = torch.randn(num_kv_heads, group, window, 8, generator=generator)
    return queries, torch.randn(num_kv_heads, num_tokens, 8, generator=generator)


@given(windows())
def test_each_query_spends_its_attention_once(tensors: tuple[Tensor, Tensor]) -> None:
    """Over all tokens, the attention of W queries sums to W, and none of it is negative."""
    queries, keys = tensors
    attention = window_attention(queries, keys, 0.5)
    total = torch.full(queries.shape[:2], float(queries.shape[2]))
    torch.testing.assert_close(attention.sum(dim=-1), total)
    assert bool((attention >= 0).all())


@given(windows(), SEEDS)
def test_the_order_of_the_context_is_irrelevant(tensors: tuple[Tensor, Tensor], seed: int) -> None:
    """Context keys in another order get the same attention, in that order."""
    queries, keys = tensors
    num_context = keys.shape[1] - queries.shape[2]
    order = torch.randperm(num_context, generator=torch.Generator().manual_seed(seed))
    order = torch.cat([order, torch.arange(num_context, keys.shape[1])])
    shuffled = window_attention(queries, keys[:, order], 0.5)
    torch.testing.assert_close(shuffled, window_attention(queries, keys, 0.5)[..., order])


@given(st.integers(1, 30), st.integers(0, 8), SEEDS)
def test_pooling_only_lifts_and_keeps_the_maximum(num_context: int, half: int, seed: int) -> None:
    """A pooled score is no less than the token's own, the best token's is unchanged."""
    attention = torch.rand(2, 3, num_context + 4, generator=torch.Generator().manual_seed(seed))
    pooled = pooled_importance(attention, num_context, pool_kernel=2 * half + 1)
    own = attention[..., :num_context]
    assert pooled.shape == own.shape
    assert bool((pooled >= own).all())
    assert torch.equal(pooled.amax(dim=-1), own.amax(dim=-1))
    if half == 0:
        assert torch.equal(pooled, own)
