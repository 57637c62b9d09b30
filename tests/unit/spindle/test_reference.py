"""Attention over a reduced cache: against a full softmax under a mask."""

import pytest
import torch
from torch import Tensor

import oracles
from vllm_spindle.core.reference import attend_reduced

NUM_QUERIES, NUM_KV_HEADS, GROUP, NUM_TOKENS, HEAD_SIZE = 3, 2, 2, 12, 4
NUM_CONTEXT = 7
SCALE = HEAD_SIZE**-0.5


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the last three of twelve tokens, and all keys and values."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(NUM_QUERIES, NUM_KV_HEADS * GROUP, HEAD_SIZE, generator=generator)
    keys = torch.randn(NUM_TOKENS, NUM_KV_HEADS, HEAD_SIZE, generator=generator)
    values = torch.randn(NUM_TOKENS, NUM_KV_HEADS, HEAD_SIZE, generator=generator)
    return queries, keys, values


def test_shared_choice_equals_masked_softmax(tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    """With one choice per kv head, all its query heads see the same kept tokens."""
    kept = torch.tensor([[0, 3, 6], [1, 2, 5]])
    visible = oracles.kept_mask(
        kept[:, None].expand(-1, GROUP, -1), NUM_QUERIES, NUM_TOKENS, NUM_CONTEXT
    )
    expected = oracles.masked_attention(*tensors, visible, SCALE)
    outputs = attend_reduced(*tensors, kept, num_context=NUM_CONTEXT, scale=SCALE)
    torch.testing.assert_close(outputs, expected)


def test_choice_per_query_head_equals_masked_softmax(
    tensors: tuple[Tensor, Tensor, Tensor],
) -> None:
    """With one choice per query head, each sees its own kept tokens."""
    kept = torch.tensor([[[0, 3], [1, 6]], [[2, 5], [0, 4]]])
    visible = oracles.kept_mask(kept, NUM_QUERIES, NUM_TOKENS, NUM_CONTEXT)
    expected = oracles.masked_attention(*tensors, visible, SCALE)
    outputs = attend_reduced(*tensors, kept, num_context=NUM_CONTEXT, scale=SCALE)
    torch.testing.assert_close(outputs, expected)


def test_nothing_kept_leaves_the_window(tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    """With no context kept, the outputs are those of the tokens from num_context on alone."""
    queries, keys, values = tensors
    tail = (keys[NUM_CONTEXT:], values[NUM_CONTEXT:])
    visible = oracles.causal_mask(NUM_QUERIES, NUM_KV_HEADS * GROUP, NUM_TOKENS - NUM_CONTEXT)
    expected = oracles.masked_attention(queries, *tail, visible, SCALE)
    none = torch.empty(NUM_KV_HEADS, 0, dtype=torch.int64)
    outputs = attend_reduced(*tensors, none, num_context=NUM_CONTEXT, scale=SCALE)
    torch.testing.assert_close(outputs, expected)


def test_evicted_tokens_have_no_effect(tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    """Whatever an evicted token's key and value are, no output moves."""
    queries, keys, values = tensors
    kept = torch.tensor([[0, 3, 6], [0, 3, 6]])
    before = attend_reduced(*tensors, kept, num_context=NUM_CONTEXT, scale=SCALE)
    keys[[1, 2, 4, 5]] = 50.0
    values[[1, 2, 4, 5]] = -50.0
    after = attend_reduced(queries, keys, values, kept, num_context=NUM_CONTEXT, scale=SCALE)
    assert torch.equal(before, after)


def test_half_precision_is_attended_in_float32(tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    """bfloat16 inputs give the float32 outputs of the same numbers."""
    kept = torch.tensor([[0, 3], [1, 2]])
    rounded = [t.bfloat16() for t in tensors]
    outputs = attend_reduced(*rounded, kept, num_context=NUM_CONTEXT, scale=SCALE)
    widened = [t.float() for t in rounded]
    expected = attend_reduced(*widened, kept, num_context=NUM_CONTEXT, scale=SCALE)
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs, expected)
