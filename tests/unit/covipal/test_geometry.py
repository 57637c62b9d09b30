"""Newlines and grids of packed pictures, against packing them here."""

import pytest
import torch

from vllm_covipal.core.geometry import newline_mask, packed_grids


def test_newlines_are_found_by_value() -> None:
    """In the rows' own type: bf16 rows carry a rounded newline."""
    newline = torch.tensor([0.1, 0.2])
    rows = torch.tensor([[1.0, 2.0], [0.1, 0.2], [0.1, 0.3]]).bfloat16()
    rows[1] = newline.bfloat16()
    assert newline_mask(rows, newline).tolist() == [False, True, False]


@pytest.mark.parametrize("crop", [(2, 2), (3, 5), (1, 1)])
@pytest.mark.parametrize("lines", [1, 2, 7])
@pytest.mark.parametrize("cols", [1, 4])
def test_a_base_crop_and_lines(crop: tuple[int, int], lines: int, cols: int) -> None:
    """What is packed line by line is read back."""
    mask = [False] * (crop[0] * crop[1])
    mask += ([False] * cols + [True]) * lines
    expected = (crop, (lines, cols))
    if lines == 1 and cols % (crop[0] * crop[1]) == 0:
        expected = (crop,) * (1 + cols // (crop[0] * crop[1]))  # as a video of that many frames
    assert packed_grids(torch.tensor(mask), crop) == expected


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_crops_or_frames_and_one_newline(frames: int) -> None:
    """A single crop, or the frames of a video, end in one newline."""
    mask = torch.tensor([False] * 6 * frames + [True])
    assert packed_grids(mask, (2, 3)) == ((2, 3),) * frames


@pytest.mark.parametrize(
    "mask", [[False] * 5, [False] * 4 + [True, False], [False] * 5 + [True, True], [True] * 3]
)
def test_another_packing_has_no_grids(mask: list[bool]) -> None:
    """No guess: selectors then treat the candidates as a row."""
    assert packed_grids(torch.tensor(mask), (2, 2)) == ()
