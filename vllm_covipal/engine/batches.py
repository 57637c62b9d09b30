"""A batch of vLLM's processor fields, taken apart into items and put together again.

vLLM batches in two ways: stacked (or listed, where shapes differ), and flat, items one after the
other with a grid field that says how long each is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def split_items(
    fields: Mapping[str, Any], flat_fields: Mapping[str, str], num_items: int
) -> list[dict[str, Any]]:
    """Each item's own fields.

    Args:
        fields: of the batch.
        flat_fields: flat field -> the field of its grids.
        num_items: items in the batch.
    """
    items: list[dict[str, Any]] = [{} for _ in range(num_items)]
    for name, value in fields.items():
        grids = flat_fields.get(name)
        parts = list(value) if grids is None else _split_flat(value, fields[grids])
        for item, part in zip(items, parts, strict=True):
            item[name] = part
    return items


def join_items(
    items: Sequence[Mapping[str, Any]], flat_fields: Mapping[str, str]
) -> dict[str, Any]:
    """The batch of these items, as vLLM would have made it."""
    return {
        name: _join([item[name] for item in items], is_flat=name in flat_fields)
        for name in items[0]
    }


def micro_batches(num_rows: Sequence[int], max_rows: int) -> list[list[int]]:
    """Indices of items in runs of at most ``max_rows`` rows; a larger item is alone.

    For example rows 4, 4, 9, 2 at most 8: ``[[0, 1], [2], [3]]``.
    """
    runs: list[list[int]] = []
    filled = 0
    for i, rows in enumerate(num_rows):
        if runs and filled + rows <= max_rows:
            runs[-1].append(i)
            filled += rows
        else:
            runs.append([i])
            filled = rows
    return runs


def _split_flat(value: torch.Tensor, grids: torch.Tensor) -> list[torch.Tensor]:
    # Embeddings are merged patches, so their share of the rows is the same and not the count.
    patches = [int(grid.prod()) for grid in grids]
    merged = sum(patches) // value.shape[0]
    return list(value.split([count // merged for count in patches]))


def _join(parts: list[Any], *, is_flat: bool) -> Any:
    if is_flat:
        return torch.cat(parts)
    if all(isinstance(part, torch.Tensor) for part in parts):
        same = len({part.shape for part in parts}) == 1
        return torch.stack(parts) if same else parts
    return parts
