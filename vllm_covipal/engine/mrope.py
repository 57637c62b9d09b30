"""M-RoPE positions of pruned items: every kept token and all text stand where they stood unpruned.

When a request is admitted the kept rows are not known, so its text gets its true positions and its
visual tokens a provisional one. The encoder then appends to each kept row its place in the item's
grid; as a chunk is computed, vLLM hands those rows to ``place_rows``.

An offset is written as two base-256 digits, because rows are bf16, which is exact to 256 only.

Shapes: N prompt tokens, K kept rows, D width; three axes: time, height, width.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

NUM_AXES = 3
NUM_CHANNELS = 2 * NUM_AXES
DIGIT = 256
MAX_OFFSET = DIGIT * DIGIT - 1


def grid_offsets(model: Any, modality: str, fields: Mapping[str, Any]) -> Tensor:
    """Places of an item's rows, unpruned, relative to its first: the model's own arithmetic.

    Args:
        model: the stock model; asked as if the prompt were this item alone.
        modality: image or video.
        fields: the item's processor fields.

    Returns:
        [3, rows], int64, at least 0.
    """
    data = {name: SimpleNamespace(data=value) for name, value in fields.items()}
    feature = SimpleNamespace(
        modality=modality, data=data, mm_position=SimpleNamespace(offset=0, length=0)
    )
    _, frames, high, wide, _ = next(iter(model.iter_mm_grid_thw([feature])))
    positions, _ = model.stock_mrope_positions([0] * (frames * high * wide), [feature])
    return positions


def append_offsets(rows: Tensor, offsets: Tensor) -> Tensor:
    """Rows with their places behind them.

    Args:
        rows: [K, D].
        offsets: [3, K], 0 to ``MAX_OFFSET``.

    Returns:
        [K, D + 6].
    """
    digits = torch.cat([offsets // DIGIT, offsets % DIGIT]).T
    return torch.cat([rows, digits.to(rows)], dim=1)


def split_offsets(rows: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """What ``append_offsets`` joined; no places for rows of an unpruned item.

    Args:
        rows: [K, D] or [K, D + 6].
        width: D.

    Returns:
        Rows [K, D] and places [3, K].
    """
    if rows.shape[1] == width:
        return rows, None
    digits = rows[:, width:].round().to(torch.int64).T
    return rows[:, :width], digits[:NUM_AXES] * DIGIT + digits[NUM_AXES:]


def prompt_positions(
    model: Any, input_tokens: Sequence[int], mm_features: Sequence[Any]
) -> tuple[Tensor, int]:
    """Positions of a pruned prompt: those of the unpruned one, at the tokens that are there.

    Args:
        model: with the stock arithmetic.
        input_tokens: the prompt as it is scheduled.
        mm_features: its items; an item's length may be less than its grid.

    Returns:
        [3, N], visual tokens provisional, and the offset from index to position after the prompt.
    """
    features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
    stretched, kept, num_added = [], [], 0
    end = 0
    for feature in features:
        position = feature.mm_position
        _, frames, high, wide, _ = next(iter(model.iter_mm_grid_thw([feature])))
        start = position.offset + num_added
        kept.append(torch.arange(end, start + position.length))
        end = start + frames * high * wide
        num_added += frames * high * wide - position.length
        stretched.append(
            SimpleNamespace(
                modality=feature.modality,
                data=feature.data,
                mm_position=SimpleNamespace(offset=start, length=frames * high * wide),
            )
        )
    num_unpruned = len(input_tokens) + num_added
    kept.append(torch.arange(end, num_unpruned))
    unpruned, delta = model.stock_mrope_positions([0] * num_unpruned, stretched)
    return unpruned[:, torch.cat(kept)].contiguous(), delta + num_added


def place_rows(
    input_ids: Sequence[int] | Tensor,
    placeholder_ids: Sequence[int],
    rows: Sequence[Tensor],
    positions: Tensor,
    num_computed_tokens: int,
    width: int,
) -> tuple[list[Tensor], Tensor, int]:
    """Write the true positions of the rows of one chunk.

    The rows stand at the visual tokens from ``num_computed_tokens`` on, in order. An item starts
    one after the text token before it.

    Args:
        input_ids: the prompt. [N].
        placeholder_ids: tokens that stand for a visual row.
        rows: of the chunk, item by item, with or without places.
        positions: of the prompt so far. [3, N].
        num_computed_tokens: tokens before the chunk.
        width: D.

    Returns:
        Rows without places, positions, and the offset from index to position after the prompt.
    """
    parts = [split_offsets(of_item, width) for of_item in rows]
    if any(offsets is not None for _, offsets in parts):
        positions = positions.clone()
        prompt = torch.as_tensor(input_ids, device=positions.device)
        is_visual = torch.isin(prompt, prompt.new_tensor(list(placeholder_ids)))
        indices = torch.arange(len(prompt), device=prompt.device)
        before = torch.where(is_visual, -1, indices).cummax(0).values
        where = is_visual[num_computed_tokens:].nonzero().squeeze(1) + num_computed_tokens
        done = 0
        for of_item, offsets in parts:
            places = where[done : done + of_item.shape[0]]
            done += of_item.shape[0]
            if offsets is not None:
                text = before[places]
                start = torch.where(text < 0, 0, positions[0, text.clamp(min=0)] + 1)
                positions[:, places] = start + offsets.to(positions.device)
    delta = int(positions.max()) + 1 - len(input_ids)
    return [of_item for of_item, _ in parts], positions, delta
