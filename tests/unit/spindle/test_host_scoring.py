"""The CPU's scoring kernel against the torch functions of the core.

Shapes: K kv heads, G query heads per kv head, Q queries, T tokens, D head size.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from vllm_spindle.core.scoring import Questions, answer
from vllm_spindle.kernels.decode import HAS_BF16_PRODUCTS
from vllm_spindle.kernels.host_scoring import HostKeys, host_keys

pytestmark = pytest.mark.skipif(not HAS_BF16_PRODUCTS, reason="needs AVX512_BF16")

TOLERANCE = 2e-6  # of probabilities and of their sums, times the queries' width; float32


@dataclass(frozen=True)
class Case:
    """One prompt. ``spread`` queries before a window of ``window``, ``ahead`` behind the prompt."""

    num_tokens: int
    spread: int = 20
    window: int = 8
    ahead: int = 0
    head_size: int = 32
    group: int = 2
    num_kv_heads: int = 2
    width: float = 2.0


CASES = {
    "short": Case(45),
    "one token": Case(1, spread=0, window=1),
    "two queries": Case(77, spread=0, window=2),
    "three queries, two of them ahead": Case(77, spread=0, window=1, ahead=2),
    "a window that is the prompt": Case(24, spread=0, window=24),
    "a whole strip": Case(64),
    "whole strips": Case(256, spread=21),
    "many queries": Case(420, spread=150, window=32),
    "every token asks": Case(140, spread=132, num_kv_heads=1, group=1),
    "ahead, group of 5": Case(203, ahead=5, group=5),
    "head size 64, one query head": Case(150, head_size=64, group=1),
    "head size 80": Case(150, head_size=80),
    "head size 128, group of 7": Case(290, head_size=128, group=7),
    "head size 256": Case(150, head_size=256, num_kv_heads=1),
    "peaks far apart": Case(200, width=20.0),
}


def make_prompt(case: Case) -> tuple[Tensor, Tensor, Tensor, float]:
    """Queries as the stash has them, query by query; keys as read from the cache; positions."""
    torch.manual_seed(case.num_tokens)
    first_window = case.num_tokens - case.window
    positions = torch.cat(
        [
            torch.randperm(first_window)[: case.spread].sort().values,
            torch.arange(first_window, case.num_tokens + case.ahead),
        ]
    )
    num_heads = case.num_kv_heads * case.group
    queries = (case.width * torch.randn(len(positions), num_heads, case.head_size)).bfloat16()
    queries = queries.view(len(positions), case.num_kv_heads, case.group, -1).permute(1, 2, 0, 3)
    keys = torch.randn(case.num_tokens, case.num_kv_heads, case.head_size).bfloat16()
    return queries, keys.transpose(0, 1), positions, case.head_size**-0.5


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_equals_the_core(name: str, num_threads: int) -> None:
    """Whatever is asked, up to float32 error; what nobody sees is exactly 0."""
    case = CASES[name]
    queries, keys, positions, scale = make_prompt(case)
    asking = case.spread + case.window
    window = range(case.spread, asking)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for last_first in (None, case.spread, asking - 1, asking if case.ahead else None):
            for from_afar in (False, True):
                questions = Questions(window, last_first, from_afar)
                found = host_keys(keys)
                assert isinstance(found, HostKeys)
                ours = found.answer(queries, positions, scale, questions)
                theirs = answer(queries, keys, positions, scale, questions)
                assert len(ours) == len(theirs) == questions.num_maps
                for mine, other in zip(ours, theirs, strict=True):
                    assert mine.shape == other.shape and mine.dtype == other.dtype
                    assert float((mine - other).abs().max()) < TOLERANCE * case.width
                    assert torch.equal(mine[other == 0] <= 2.0**-126, other[other == 0] == 0)
    finally:
        torch.set_num_threads(before)


def test_what_it_was_not_made_for_is_torchs() -> None:
    """float32, and head sizes that make no pairs: the keys come back as they are."""
    for keys in (torch.randn(2, 9, 32), torch.randn(2, 9, 15).bfloat16()):
        assert host_keys(keys) is keys


def test_what_does_not_fit_is_refused_by_value() -> None:
    """Queries of another type, of other heads or sizes."""
    queries, keys, positions, scale = make_prompt(Case(45))
    found = host_keys(keys)
    assert isinstance(found, HostKeys)
    for wrong in (queries.float(), queries[:1], queries[..., :16]):
        with pytest.raises(ValueError, match=r"keys of 2 heads, 32 bfloat16 each, got queries \("):
            found.answer(wrong, positions, scale, Questions(range(20, 28)))
