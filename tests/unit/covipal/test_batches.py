"""Batches of processor fields, apart and together again."""

import pytest
import torch

from vllm_covipal.engine.batches import join_items, micro_batches, split_items

FLAT = {"pixel_values": "image_grid_thw", "image_embeds": "image_grid_thw"}


def test_stacked_and_listed_fields_round_trip() -> None:
    """Equal shapes are one tensor, unequal ones a list; both come back as they were."""
    batch = {"pixel_values": torch.randn(3, 4, 5), "image_sizes": torch.tensor([[1, 2]] * 3)}
    items = split_items(batch, {}, 3)
    assert all(torch.equal(items[i]["pixel_values"], batch["pixel_values"][i]) for i in range(3))
    joined = join_items(items, {})
    assert all(torch.equal(joined[name], batch[name]) for name in batch)

    ragged = {"pixel_values": [torch.randn(n, 3) for n in (1, 4, 2)]}
    joined = join_items(split_items(ragged, {}, 3), {})
    assert isinstance(joined["pixel_values"], list)
    assert [len(part) for part in joined["pixel_values"]] == [1, 4, 2]


@pytest.mark.parametrize("merged", [1, 4])
def test_flat_fields_are_cut_by_their_grids(merged: int) -> None:
    """Patches by the grid's product; merged embeddings by a share of it."""
    grids = torch.tensor([[1, 4, 4], [2, 2, 6], [1, 2, 2]])
    sizes = [int(grid.prod()) // merged for grid in grids]
    field = "pixel_values" if merged == 1 else "image_embeds"
    batch = {field: torch.randn(sum(sizes), 3), "image_grid_thw": grids}
    items = split_items(batch, FLAT, 3)
    assert [len(item[field]) for item in items] == sizes
    chosen = join_items([items[2], items[0]], FLAT)
    assert torch.equal(chosen[field], torch.cat([items[2][field], items[0][field]]))
    assert chosen["image_grid_thw"].tolist() == [[1, 2, 2], [1, 4, 4]]


def test_micro_batches_stay_within_the_budget_in_order() -> None:
    """A larger item is alone; every item is there once."""
    assert micro_batches([4, 4, 9, 2], 8) == [[0, 1], [2], [3]]
    assert micro_batches([], 8) == []
    sizes = torch.randint(1, 12, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    runs = micro_batches(sizes, 16)
    assert [i for run in runs for i in run] == list(range(50))
    assert all(sum(sizes[i] for i in run) <= 16 for run in runs if len(run) > 1)
