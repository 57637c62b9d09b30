"""The packed sort and the count against torch's own sort."""

from typing import Any
from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vllm_spindle.core import ordering
from vllm_spindle.core.eviction import rank_tokens
from vllm_spindle.core.ordering import ascending, best_first, ranks
from vllm_spindle.core.scoring import in_turns

FLOATS = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0])
INTEGERS = st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 2)


@st.composite
def scores(draw: st.DrawFn) -> Tensor:
    """A few heads' scores, many of them equal, as floats or as integers. [2, 2, N]."""
    numbers, dtype = draw(st.sampled_from([(FLOATS, torch.float32), (INTEGERS, torch.int64)]))
    count = draw(st.integers(0, 40))
    values = draw(st.lists(numbers, min_size=4 * count, max_size=4 * count))
    return torch.tensor(values, dtype=dtype).view(2, 2, count)


@given(scores())
def test_best_first_is_the_stable_sort(values: Tensor) -> None:
    """The same order, of equals too, and the scores are left as they were."""
    before = values.clone()
    expected = values.argsort(dim=-1, descending=True, stable=True)
    assert torch.equal(best_first(values), expected)
    assert torch.equal(best_first(values.transpose(0, 1)), expected.transpose(0, 1))
    assert torch.equal(values, before)


@given(st.integers(0, 5), st.integers(1, 40), st.randoms(use_true_random=False))
def test_turns_are_counted_as_they_are_sorted(num_spare: int, num_tokens: int, random: Any) -> None:
    """Ranks and order by counting are those of a sort, row by row, turns left out or not."""
    num_turns = num_tokens + num_spare
    turns = torch.tensor([random.sample(range(num_turns), num_tokens) for _ in range(3)])
    expected = turns.argsort(dim=-1)
    with patch.object(ordering, "BY_NUMPY", ()):
        assert torch.equal(best_first(-turns.float(), num_turns=num_turns), expected)
        assert torch.equal(ranks(-turns.float(), num_turns=num_turns), expected.argsort(dim=-1))


@given(st.integers(1, 8), st.integers(0, 30), st.sampled_from(["union", "mean", "unfold"]))
def test_a_device_ranks_as_the_cpu(group: int, num_kept: int, gqa: Any) -> None:
    """Two scores in turns, pooled so that many are equal, behind a prefix; whatever is kept."""
    torch.manual_seed(group + num_kept)
    first, second, third = torch.randint(0, 9, (3, 2, group, 40)).float()
    found = []
    for by_numpy in ({"cpu"}, ()):
        with patch.object(ordering, "BY_NUMPY", by_numpy):
            scores = in_turns(in_turns(first, second), third, num_turns=80)[..., 7:]
            found.append(rank_tokens(scores, num_kept, gqa, num_turns=80))
    assert torch.equal(*found)


@given(st.integers(0, 5), st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 4))
def test_ascending_marks_as_it_sorts(num_spare: int, counts: list[int], seed: int) -> None:
    """Each row's best, by place: as many of each row, or of each its own number."""
    torch.manual_seed(seed)
    most = max(counts)
    ranked = torch.stack([torch.randperm(most + num_spare)[:most] + 2 for _ in counts])
    for wanted in (counts, [min(counts)] * len(counts)):
        expected = [sorted(row[:count].tolist()) for row, count in zip(ranked, wanted, strict=True)]
        for by_numpy in ({"cpu"}, ()):
            with patch.object(ordering, "BY_NUMPY", by_numpy):
                found = ascending(ranked, wanted, most + num_spare + 2)
            assert found.tolist() == sum(expected, [])
