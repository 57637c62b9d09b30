"""Layers ranked in one go choose as each would alone, on a device and on the CPU."""

from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vllm_spindle.core import ordering
from vllm_spindle.core.choice import (
    RANKED_AT_ONCE,
    ChoiceRule,
    attention_maps,
    choose_by_maps,
    choose_kept,
    keep_by_head,
    layers_at_once,
    rank_context,
    rank_maps,
    stack_maps,
)
from vllm_spindle.core.modality import VisualCap

TOKENS, CONTEXT, PROTECTED, AHEAD = 60, 48, 5, 2
OBSERVED = torch.cat([torch.arange(40, 44), torch.arange(52, 62)])
RULES = st.builds(
    ChoiceRule,
    score=st.sampled_from(["received", "pooled", "paper", "random"]),
    pool_kernel=st.sampled_from([1, 7]),
    gqa=st.sampled_from(["union", "mean", "unfold"]),
    seed=st.integers(0, 3),
    window=st.just(8),
    last_query=st.booleans(),
)
VISUALS = st.sampled_from([None, VisualCap(torch.arange(TOKENS) % 3 == 0, 0.5)])


def _layers(num_layers: int, group: int) -> list[tuple[Tensor, Tensor]]:
    shape = (num_layers, 2, group, len(OBSERVED), 8)
    return list(zip(2 * torch.randn(shape), torch.randn(num_layers, 2, TOKENS, 8), strict=True))


@given(RULES, st.integers(1, 4), st.integers(1, 3), st.integers(0, 43), VISUALS)
def test_stacked_layers_keep_as_each_alone(
    rule: ChoiceRule, num_layers: int, group: int, num_kept: int, visual: VisualCap | None
) -> None:
    """The same positions for every layer, and so for kv heads with numbers of their own."""
    torch.manual_seed(num_layers + num_kept)
    layers = _layers(num_layers, group)
    common = {"scale": 0.3, "num_context": CONTEXT, "num_ahead": AHEAD}
    counts = {"num_kept": num_kept, "num_protected": PROTECTED, "visual": visual}
    alone = [choose_kept(rule, *each, OBSERVED, **common, **counts) for each in layers]
    by_rank = [rank_context(rule, *each, OBSERVED, **common, **counts) for each in layers]
    heads = [num_kept // (1 + head) for head in range(2 * num_layers)]
    for by_numpy in ({"cpu"}, ()):
        with patch.object(ordering, "BY_NUMPY", by_numpy):
            maps = [attention_maps(rule, *each, OBSERVED, **common) for each in layers]
            stacked = stack_maps(maps)
            assert torch.equal(choose_by_maps(rule, stacked, **counts), torch.cat(alone))
            ranked = rank_maps(rule, stacked, **counts)
            assert torch.equal(ranked, torch.cat(by_rank))
            if rule.gqa != "unfold":
                for row, count, kept in zip(
                    ranked, heads, keep_by_head(ranked, heads, CONTEXT), strict=True
                ):
                    assert kept.tolist() == sorted(row[:count].tolist())


def test_as_many_layers_as_fill_a_device() -> None:
    """All of a model at 4k tokens, one at 131,072; never none."""
    assert layers_at_once(32, 4096) == 32
    assert layers_at_once(32, 32_768) == 4
    assert layers_at_once(32, 131_072) == layers_at_once(64, RANKED_AT_ONCE) == 1
