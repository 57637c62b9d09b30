"""Which queries score a prompt: few, late, and never ones that the prefix cache may have saved."""

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_spindle.core.bands import split_layers
from vllm_spindle.core.budget import plan_prompt, shareable_blocks
from vllm_spindle.core.observers import first_observed, observed_positions


@given(st.integers(1, 5000), st.integers(1, 200), st.integers(0, 400), st.integers(0, 5000))
def test_observers_are_spread_before_the_window(
    prompt_len: int, window: int, observers: int, first: int
) -> None:
    """The window whole, at most M others between ``first`` and it, evenly, none twice."""
    found = observed_positions(prompt_len, window=window, observers=observers, first=first)
    start = max(0, prompt_len - window)
    assert found[found >= start].tolist() == list(range(start, prompt_len))
    others = found[found < start]
    assert len(others) == min(observers, max(0, start - first))
    steps = np.diff(others)
    assert (steps >= 1).all()
    assert len(steps) == 0 or steps.max() - steps.min() <= 1
    assert not len(others) or others[0] == first
    assert not len(steps) or 1 <= start - others[-1] <= steps.max() + 1


@given(
    st.integers(1, 4000),
    st.fractions(min_value=Fraction(1, 100), max_value=1, max_denominator=100),
    st.sampled_from([1, 16, 32]),
    st.integers(1, 100),
    st.integers(1, 100),
    st.sampled_from([0, 1, 256]),
    st.integers(0, 3000),
    st.sampled_from(["pyramid", "uniform"]),
)
def test_what_observes_is_computed(
    prompt_len: int,
    keep_ratio: Fraction,
    block_size: int,
    window: int,
    recent: int,
    observers: int,
    protected: int,
    shape: str,
) -> None:
    """The longest hit that every band allows ends before the first observed token."""
    plans = plan_prompt(
        prompt_len,
        keep_ratio=keep_ratio,
        recent=recent,
        block_size=block_size,
        bands=split_layers(6, 3),
        beta=Fraction(1, 20),
        shape=shape,
        protected_tokens=protected,
        window=window,
        observers=observers,
    )
    limits = [b for b in shareable_blocks(plans, prompt_len, block_size) if b is not None]
    if not limits:
        assert not any(plan.is_reduced for plan in plans)
        return
    observed = observed_positions(
        prompt_len, window=window, observers=observers, first=plans[0].observed_from
    )
    assert 0 <= min(limits) * block_size <= observed[0]
    assert all(limit <= plan.first_block for limit, plan in zip(limits, plans, strict=True)) or any(
        not plan.is_reduced for plan in plans
    )


def test_observers_lie_in_the_last_half() -> None:
    """1,000 tokens: from the shared ones on, yet not before the half, and at least a quarter."""
    dials = {"window": 32, "observers": 256, "prefix_tokens": 0}
    assert first_observed(1000, shared_tokens=200, **dials) == 500
    assert first_observed(1000, shared_tokens=608, **dials) == 608
    assert first_observed(1000, shared_tokens=928, **dials) == 750
    assert first_observed(100, shared_tokens=96, **dials) == 68  # the window is more than a quarter
    # Of what follows a protected prefix; and without observers the window alone.
    assert first_observed(1000, shared_tokens=928, **dials | {"prefix_tokens": 800}) == 928
    assert first_observed(1000, shared_tokens=200, **dials | {"observers": 0}) == 968
