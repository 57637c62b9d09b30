"""Retention, its bias and its gradient; budget terms."""

import pytest
import torch

from vllm_covipal.core.losses import budget_loss
from vllm_covipal.core.soft_mask import (
    DROPPED,
    budgeted_retention,
    compact_positions,
    retention_bias,
    sigmoid_retention,
    straight_through_bias,
)


def _scores(num: int = 20) -> torch.Tensor:
    return torch.randn(num, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3


def test_a_bias_scales_attention_by_the_retention() -> None:
    """softmax(s + log p) is p exp(s), normalised; one token fully kept stays what it is."""
    scores, retention = _scores(6), torch.tensor([1, 0.5, 0.01, 1, 0.2, 0.9]).double()
    expected = retention * scores.exp() / (retention * scores.exp()).sum()
    assert torch.allclose((scores + retention_bias(retention)).softmax(0), expected)
    assert retention_bias(torch.ones(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("num_kept", [1, 2, 10, 19])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0])
def test_a_budgeted_retention_adds_up(num_kept: int, temperature: float) -> None:
    """Exactly, in the order of the scores; cold, it is the hard choice."""
    scores = _scores()
    shares = budgeted_retention(scores, num_kept, temperature)
    assert float(shares.sum()) == pytest.approx(num_kept, abs=1e-4)
    assert torch.equal(shares.argsort(), scores.argsort()) or temperature < 1
    if temperature == 0.05:
        assert set(shares.topk(num_kept).indices.tolist()) == set(
            scores.topk(num_kept).indices.tolist()
        )


def test_the_budgeted_gradient_is_the_numeric_one() -> None:
    """The implicit gradient, against finite differences."""
    scores = _scores(8).requires_grad_()
    torch.autograd.gradcheck(lambda s: budgeted_retention(s, 3, 0.7), scores, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("num_kept", [0, 20, -1])
def test_a_budget_that_is_no_choice_is_refused(num_kept: int) -> None:
    """None, or all."""
    with pytest.raises(ValueError, match=f"num_kept must be in .0, 20., got {num_kept}"):
        budgeted_retention(_scores(), num_kept)


def test_positions_close_up_by_what_is_left_out() -> None:
    """A hard choice counts what stays before a token, halves count half, nothing moves at p = 1."""
    gone = DROPPED
    bias = torch.tensor([[0, 0, gone, 0, gone, 0], [0, 0, 0, 0, 0, 0]], requires_grad=True)
    places = compact_positions(bias)
    assert places.tolist() == [[0, 1, 2, 2, 3, 3], [0, 1, 2, 3, 4, 5]]
    assert not places.requires_grad
    halves = compact_positions(torch.tensor([[0, 0.5, 0.25, 1]]).log().nan_to_num(neginf=gone))
    assert halves.tolist() == [pytest.approx([0, 0, 0.5, 0.75])]


def test_straight_through_is_hard_forward_and_soft_backward() -> None:
    """The bias is 0 or out of sight; the gradient is that of log sigmoid."""
    scores = _scores(5).requires_grad_()
    bias = straight_through_bias(scores, torch.tensor([1, 4]))
    assert bias.tolist() == pytest.approx([DROPPED, 0, DROPPED, DROPPED, 0])
    bias.sum().backward()
    expected = 1 - sigmoid_retention(scores.detach())  # d log sigmoid(s) / ds
    assert torch.allclose(scores.grad, expected)


@pytest.mark.parametrize(
    ("kind", "above", "below"),
    [("squared", 0.04, 0.04), ("absolute", 0.2, 0.2), ("one_sided", 0.04, 0), ("none", 0, 0)],
)
def test_budget_terms(kind: str, above: float, below: float) -> None:
    """0.2 over and 0.2 under a ratio of 0.3."""
    for mean, expected in ((0.5, above), (0.1, below), (0.3, 0)):
        retention = torch.tensor([mean - 0.1, mean + 0.1])
        assert float(budget_loss(retention, 0.3, kind)) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="squared, absolute"):
        budget_loss(torch.ones(2), 0.5, "cubic")  # type: ignore[arg-type]
