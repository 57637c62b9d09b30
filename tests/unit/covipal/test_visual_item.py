"""A visual item refuses what contradicts itself, and knows its candidates."""

import pytest
import torch

from vllm_covipal.core.visual_item import VisualItem, with_structure

MASK = torch.tensor([False, False, True, False, False, True])


def _item(**changes: object) -> VisualItem:
    fields = {
        "visual": torch.arange(12.0).view(6, 2),
        "text": torch.zeros(0, 2),
        "structure_mask": MASK,
        "grids": ((2, 2),),
        "num_kept": 2,
    }
    return VisualItem(**(fields | changes))


def test_candidates_are_what_is_no_structure() -> None:
    """Two lines of two rows and a newline each: four candidates."""
    item = _item()
    assert item.num_candidates == 4
    assert item.candidate_rows().tolist() == [0, 1, 3, 4]
    assert item.candidates().tolist() == item.visual[[0, 1, 3, 4]].tolist()


def test_without_structure_every_row_is_a_candidate() -> None:
    """No mask, no structure."""
    item = _item(structure_mask=None, grids=())
    assert item.num_candidates == 6
    assert item.candidate_rows().tolist() == list(range(6))
    assert item.candidates() is item.visual


def test_kept_candidates_join_the_structure_rows_in_order() -> None:
    """The last and the second of the candidates, and both newlines."""
    assert with_structure(_item(), torch.tensor([3, 1])).tolist() == [1, 2, 4, 5]
    assert with_structure(_item(structure_mask=None, grids=()), torch.tensor([3, 1])).tolist() == [
        1,
        3,
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": torch.zeros(3, 4)}, r"text must be \[T, 2\]"),
        ({"structure_mask": MASK[:5]}, r"structure_mask must be \[6\] bool"),
        ({"structure_mask": MASK.int()}, r"structure_mask must be \[6\] bool"),
        ({"num_kept": 5}, r"num_kept must be in \[0, 4\], got 5"),
        ({"num_kept": -1}, r"num_kept must be in \[0, 4\], got -1"),
        ({"grids": ((2, 3),)}, "do not hold 4 candidates"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, object], message: str) -> None:
    """Shapes, counts and grids agree or there is no item."""
    with pytest.raises(ValueError, match=message):
        _item(**changes)
