"""The packed sort against torch's own."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vllm_spindle.core.ordering import best_first

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
