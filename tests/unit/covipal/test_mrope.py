"""Positions of kept rows: carried exactly, and placed alike in one chunk or many."""

import pytest
import torch

from vllm_covipal.engine.mrope import append_offsets, place_rows, split_offsets

WIDTH = 8
IMAGE, TEXT = 9, 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_offsets_survive_the_rows_dtype(dtype: torch.dtype) -> None:
    """Every offset to 65,535, although bf16 holds integers to 256 only."""
    offsets = torch.arange(65536).repeat(3, 1)
    offsets[1] = offsets[1].flip(0)
    rows = torch.randn(65536, WIDTH).to(dtype)
    back, found = split_offsets(append_offsets(rows, offsets), WIDTH)
    assert torch.equal(found, offsets)
    assert torch.equal(back, rows)


def test_unpruned_rows_carry_nothing() -> None:
    """They are as wide as the model."""
    rows = torch.randn(3, WIDTH)
    back, found = split_offsets(rows, WIDTH)
    assert back is rows
    assert found is None


def prompt() -> tuple[list[int], torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Two text tokens, 3 of a 4 x 4 picture, text, 2 of a 2 x 6 picture, text."""
    ids = [TEXT, TEXT, IMAGE, IMAGE, IMAGE, TEXT, IMAGE, IMAGE, TEXT]
    first = torch.tensor([[0, 0, 0], [0, 2, 3], [1, 0, 3]])
    second = torch.tensor([[0, 0], [0, 1], [5, 4]])
    # Text: 0 1, the picture starts at 2 and spans 4, text 6, the second at 7 spans 6, text 13.
    expected = torch.tensor(
        [
            [0, 1, 2, 2, 2, 6, 7, 7, 13],
            [0, 1, 2, 4, 5, 6, 7, 8, 13],
            [0, 1, 3, 2, 5, 6, 12, 11, 13],
        ]
    )
    rows = [append_offsets(torch.randn(o.shape[1], WIDTH), o) for o in (first, second)]
    provisional = expected.clone()
    provisional[:, [2, 3, 4]] = 2
    provisional[:, [6, 7]] = 7
    return ids, provisional, rows, expected


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 9])
def test_chunks_place_as_the_whole(chunk: int) -> None:
    """Wherever a chunk ends, in a picture too."""
    ids, positions, rows, expected = prompt()
    stream = iter([row for item in rows for row in item])
    for start in range(0, len(ids), chunk):
        window = ids[start : start + chunk]
        own = [next(stream)[None] for token in window if token == IMAGE]
        stripped, positions, delta = place_rows(ids, (IMAGE,), own, positions, start, WIDTH)
        assert all(row.shape == (1, WIDTH) for row in stripped)
    assert torch.equal(positions, expected)
    assert delta == 14 - len(ids)


def test_a_step_without_media_changes_nothing() -> None:
    """Decode steps ask as well."""
    ids, _, _, expected = prompt()
    stripped, positions, delta = place_rows(ids, (IMAGE,), [], expected, len(ids), WIDTH)
    assert stripped == []
    assert positions is expected
    assert delta == 14 - len(ids)
