"""How many visual tokens are kept: worked examples and an exact twin."""

from decimal import ROUND_CEILING, Decimal

import pytest

from vllm_covipal.core.budget import kept_rows, kept_tokens


@pytest.mark.parametrize(
    ("num_candidates", "keep_ratio", "expected"),
    [(10, 0.1, 1), (100, 0.07, 7), (100, 0.29, 29), (576, 0.25, 144), (576, 0.1, 58)]
    + [(5, 0.001, 1), (0, 0.5, 0), (7, 1.0, 7), (3, 1, 3), (100, 1e-5, 1)],
)
def test_the_share_is_rounded_up(num_candidates: int, keep_ratio: float, expected: int) -> None:
    """The decimal ratio counts, not its binary neighbour; one is the least of any."""
    assert kept_tokens(num_candidates, keep_ratio) == expected


def test_every_percent_equals_decimal_arithmetic() -> None:
    """All whole percents of all counts up to 700, against the decimal module."""
    for percent in range(1, 101):
        exact = Decimal(percent) / 100
        for num_candidates in range(1, 701, 7):
            expected = int((exact * num_candidates).to_integral_value(ROUND_CEILING))
            assert kept_tokens(num_candidates, percent / 100) == expected


@pytest.mark.parametrize("keep_ratio", [0, -0.1, 1.0001, float("nan"), float("inf")])
def test_ratios_outside_are_refused(keep_ratio: float) -> None:
    """A ratio is above zero and at most one."""
    with pytest.raises(ValueError, match=r"keep_ratio must be in \(0, 1\]"):
        kept_tokens(10, keep_ratio)


def test_structure_rows_come_on_top() -> None:
    """24 lines of 24 with a newline each: a quarter of 576, and the 24."""
    assert kept_rows(600, 24, 0.25) == 24 + 144
    assert kept_rows(5, 5, 0.25) == 5


@pytest.mark.parametrize("num_structure", [-1, 6])
def test_more_structure_than_rows_is_refused(num_structure: int) -> None:
    """Structure rows are among the rows."""
    with pytest.raises(ValueError, match=r"num_structure must be in \[0, 5\]"):
        kept_rows(5, num_structure, 0.5)


def test_a_negative_count_is_refused() -> None:
    """Nobody has minus one candidates."""
    with pytest.raises(ValueError, match="num_candidates must be at least 0"):
        kept_tokens(-1, 0.5)
