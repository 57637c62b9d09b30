"""What holds for every attention over a reduced cache."""

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracles
from vllm_spindle.core.reference import attend_reduced

HEAD_SIZE = 8
SCALE = HEAD_SIZE**-0.5


@dataclass(frozen=True)
class Case:
    """Queries [Q, H, D], keys and values [T, K, D], and a choice [K, G, N] of C tokens."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    kept: Tensor
    num_context: int

    def attend(self, kept: Tensor) -> Tensor:
        """The outputs with these context tokens kept."""
        return attend_reduced(
            self.queries, self.keys, self.values, kept, num_context=self.num_context, scale=SCALE
        )

    @property
    def causal(self) -> Tensor:
        """The mask of full causal attention. [Q, H, T]."""
        return oracles.causal_mask(*self.queries.shape[:2], self.keys.shape[0])

    def full(self) -> Tensor:
        """Full causal attention: nothing evicted."""
        return oracles.masked_attention(self.queries, self.keys, self.values, self.causal, SCALE)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to 12 context tokens, then at least as many more as there are queries."""
    num_kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    num_queries, num_context = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    num_tokens = num_context + num_queries + draw(st.integers(0, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    noise = torch.rand(num_kv_heads, group, num_context, generator=generator)
    kept = noise.argsort(dim=-1)[..., : draw(st.integers(0, num_context))]
    return Case(
        torch.randn(num_queries, num_kv_heads * group, HEAD_SIZE, generator=generator),
        torch.randn(num_tokens, num_kv_heads, HEAD_SIZE, generator=generator),
        torch.randn(num_tokens, num_kv_heads, HEAD_SIZE, generator=generator),
        kept,
        num_context,
    )


@given(cases())
def test_all_kept_is_full_attention(case: Case) -> None:
    """With every context token kept, outputs equal full causal attention."""
    everything = torch.arange(case.num_context).expand(case.keys.shape[1], -1)
    torch.testing.assert_close(case.attend(everything), case.full())


@settings(max_examples=100)
@given(cases())
def test_the_reference_equals_a_masked_softmax(case: Case) -> None:
    """Any choice per query head equals full softmax with the evicted logits at -inf."""
    visible = oracles.kept_mask(
        case.kept, case.queries.shape[0], case.keys.shape[0], case.num_context
    )
    expected = oracles.masked_attention(case.queries, case.keys, case.values, visible, SCALE)
    torch.testing.assert_close(case.attend(case.kept), expected)


@given(cases())
def test_a_shared_choice_is_the_same_choice_for_each_query_head(case: Case) -> None:
    """[K, N] means what [K, G, N] with G equal rows means."""
    shared = case.kept[:, 0]
    repeated = shared[:, None].expand(case.kept.shape).clone()
    assert torch.equal(case.attend(shared), case.attend(repeated))


@settings(max_examples=100)
@given(cases())
def test_the_error_is_bounded_by_the_evicted_attention(case: Case) -> None:
    """An output moves by at most twice the evicted probability times the longest value.

    With evicted mass m, full = (1 - m) kept + m evicted, both averages of values, so
    full - kept = m (evicted - kept).
    """
    visible = oracles.kept_mask(
        case.kept, case.queries.shape[0], case.keys.shape[0], case.num_context
    )
    group = case.kept.shape[1]
    keys = case.keys.repeat_interleave(group, dim=1)
    logits = torch.einsum("qhd,thd->qht", case.queries, keys) * SCALE
    weights = torch.softmax(logits.masked_fill(~case.causal, float("-inf")), dim=-1)
    evicted = (weights * ~visible).sum(dim=-1)
    error = (case.attend(case.kept) - case.full()).norm(dim=-1)
    assert bool((error <= 2 * evicted * case.values.norm(dim=-1).max() + 1e-5).all())
