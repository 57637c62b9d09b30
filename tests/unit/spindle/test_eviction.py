"""Which tokens are kept: against plain loops."""

import pytest
import torch
from torch import Tensor

import oracles
from vllm_spindle.core.eviction import gather_kept, select_kept

CHOICES = {
    "union": oracles.union_by_rank,
    "mean": oracles.mean_over_group,
    "unfold": oracles.unfold,
}


def _scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gqa", CHOICES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 8), (3, 1, 5), (1, 4, 17)])
def test_select_kept_equals_the_loop(gqa: str, shape: tuple[int, int, int]) -> None:
    """Every mode keeps what its definition keeps, at every budget from nothing to all."""
    scores = _scores(*shape)
    for num_kept in range(shape[2] + 1):
        kept = select_kept(scores, num_kept, gqa)
        assert kept.dtype == torch.int64
        assert kept.tolist() == CHOICES[gqa](scores, num_kept)


def test_union_takes_turns() -> None:
    """Two heads with opposite tastes get one token each before either gets a second.

    Head 0 ranks 0 1 2 3, head 1 ranks 3 2 1 0: the turns are 0, 3, 1, 2.
    """
    scores = torch.tensor([[[4.0, 3.0, 2.0, 1.0], [0.1, 0.2, 0.3, 0.4]]])
    assert select_kept(scores, 2, "union").tolist() == [[0, 3]]
    assert select_kept(scores, 3, "union").tolist() == [[0, 1, 3]]


def test_union_of_agreeing_heads_reaches_further() -> None:
    """Heads that name the same token spend one place on it, and the next turn goes on."""
    scores = torch.tensor([[[9.0, 5.0, 1.0, 0.0], [9.0, 0.0, 1.0, 5.0]]])
    assert select_kept(scores, 3, "union").tolist() == [[0, 1, 3]]


def test_mean_lets_a_loud_head_outvote() -> None:
    """The same scores, decided by the mean, keep only the loud head's tokens."""
    scores = torch.tensor([[[4.0, 3.0, 2.0, 1.0], [0.1, 0.2, 0.3, 0.4]]])
    assert select_kept(scores, 2, "mean").tolist() == [[0, 1]]


def test_unfold_keeps_each_heads_own() -> None:
    """Every query head keeps its own best, ascending."""
    scores = torch.tensor([[[4.0, 3.0, 2.0, 1.0], [0.1, 0.2, 0.3, 0.4]]])
    assert select_kept(scores, 2, "unfold").tolist() == [[[0, 1], [2, 3]]]


@pytest.mark.parametrize("num_kept", [-1, 6])
def test_select_kept_refuses_counts_out_of_range(num_kept: int) -> None:
    """Keeping fewer than none or more than there are is refused with the count."""
    with pytest.raises(ValueError, match=rf"num_kept must be in \[0, 5\], got {num_kept}"):
        select_kept(_scores(1, 2, 5), num_kept, "union")


def test_select_kept_refuses_an_unknown_mode() -> None:
    """A mode that does not exist is refused, and the ones that do are named."""
    with pytest.raises(ValueError, match="union, mean or unfold, got 'median'"):
        select_kept(_scores(1, 2, 5), 2, "median")


def test_gather_kept_takes_each_kv_heads_own_rows() -> None:
    """Row n of kv head k is that head's token at kept[k, n]."""
    tokens = torch.arange(2 * 5 * 3).view(2, 5, 3)
    kept = torch.tensor([[0, 4], [1, 2]])
    expected = torch.stack([tokens[0, [0, 4]], tokens[1, [1, 2]]])
    assert torch.equal(gather_kept(tokens, kept), expected)
