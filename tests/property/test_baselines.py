"""Equal true bytes, whatever the method, the prompt and the budget."""

from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_spindle.baselines import METHODS, make_method
from vllm_spindle.baselines.base import PromptLayer, ReducedLayer

# In whole blocks, and not at all where a prompt is short.
IN_BLOCKS = {"spindle", "reduce_after", "two_pass"}
# Rows as they are: what they weigh can be counted by hand.
EVICTING = sorted(set(METHODS) - {"full", "paper"} - IN_BLOCKS)


def _layers(
    num_layers: int, num_kv_heads: int, group: int, num_tokens: int, seed: int
) -> list[PromptLayer]:
    generator = torch.Generator().manual_seed(seed)
    angles = torch.arange(num_tokens + 8)[:, None] * 0.3 ** torch.arange(4)
    return [
        PromptLayer(
            queries=torch.randn(num_kv_heads, group, num_tokens, 8, generator=generator),
            keys=torch.randn(num_kv_heads, num_tokens, 8, generator=generator),
            values=torch.randn(num_kv_heads, num_tokens, 8, generator=generator),
            scale=0.35,
            layer_idx=layer_idx,
            cos_sin=torch.cat([angles.cos(), angles.sin()], dim=-1),
        )
        for layer_idx in range(num_layers)
    ]


def _held_bytes(layer: PromptLayer, reduced: ReducedLayer) -> int:
    """Two-byte elements of keys and values that are really there."""
    context = int(reduced.is_there.sum())
    tail = reduced.is_there.shape[0] * (layer.num_tokens - reduced.num_context)
    return (context + tail) * 2 * layer.keys.shape[2] * 2


@given(
    method=st.sampled_from(EVICTING),
    num_layers=st.integers(1, 5),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    num_tokens=st.integers(6, 60),
    percent=st.integers(20, 100),
    seed=st.integers(0, 9),
)
def test_methods_keep_the_same_true_bytes(
    method: str,
    num_layers: int,
    num_kv_heads: int,
    group: int,
    num_tokens: int,
    percent: int,
    seed: int,
) -> None:
    """As many bytes as were given, within a token per kv head; never more; none forgotten."""
    layers = _layers(num_layers, num_kv_heads, group, num_tokens, seed)
    reduced = make_method(method).reduce(layers, percent / 100)
    budget = Fraction(percent, 100) * sum(layer.full_bytes for layer in layers)
    found = sum(each.num_bytes for each in reduced)
    # A token of all kv heads, and under AdaKV in every layer a row less its heads' lengths.
    slack = num_kv_heads * 32 + (32 * num_layers if method == "adakv" else 0)
    assert budget - slack < found <= budget
    held = sum(_held_bytes(*pair) for pair in zip(layers, reduced, strict=True))
    lengths = 4 * num_kv_heads * num_layers if method == "adakv" else 0
    assert held <= found <= held + lengths
    for layer, each in zip(layers, reduced, strict=True):
        assert each.num_context < layer.num_tokens
        for row, there in zip(each.positions, each.is_there, strict=True):
            kept = row[there].tolist()
            assert kept == sorted(set(kept)) and all(0 <= t < each.num_context for t in kept)


@settings(max_examples=15)
@given(
    num_tokens=st.integers(20, 40),
    percent=st.integers(30, 95),
    theta=st.sampled_from([0.3, 0.9, 0.99]),
    seed=st.integers(0, 9),
)
def test_the_paper_stays_within_its_bytes(
    num_tokens: int, percent: int, theta: float, seed: int
) -> None:
    """However well the copies merge, the true bytes are held."""
    layers = _layers(2, 1, 2, num_tokens, seed)
    method = make_method("paper", window=4, theta_key=theta, theta_value=theta)
    found = sum(each.num_bytes for each in method.reduce(layers, percent / 100))
    assert found <= Fraction(percent, 100) * sum(layer.full_bytes for layer in layers)
