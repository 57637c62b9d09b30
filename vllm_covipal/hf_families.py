"""How each family of transformers encodes its media, and what it packs into the rows.

Shapes: N rows of an item, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vllm_covipal.core.geometry import newline_mask, packed_grids

Grids = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class EncodedItem:
    """One image or video of a prompt, encoded and not pruned.

    Attributes:
        rows: the projector's output as the language model sees it. [N, D].
        structure_mask: True = always kept. [N] bool, or None.
        grids: what the candidates fill, as in ``VisualItem``.
        start: index of its first placeholder in the expanded prompt.
    """

    rows: Tensor
    structure_mask: Tensor | None
    grids: Grids
    start: int = -1


def _crop_grid(model: Any) -> tuple[int, int]:
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    return side, side


def _features(get: Callable[..., Any], inputs: dict[str, Any], *names: str) -> list[Tensor]:
    """Rows of each item; none where the first input is absent."""
    if names[0] not in inputs:
        return []
    given = {name: inputs[name] for name in names if name in inputs}
    return list(get(**given, return_dict=True).pooler_output)


def _encode_llava(model: Any, inputs: dict[str, Any]) -> tuple[list[EncodedItem], ...]:
    rows = _features(model.get_image_features, inputs, "pixel_values")
    crop = _crop_grid(model)
    # The "full" strategy keeps the class token: a candidate like any other, in no grid.
    return [EncodedItem(r, None, (crop,) if len(r) == crop[0] * crop[1] else ()) for r in rows], []


def _encode_packed(model: Any, inputs: dict[str, Any]) -> tuple[list[EncodedItem], ...]:
    names = ("pixel_values", "image_sizes", "batch_num_images")
    crop = _crop_grid(model)
    images = _features(model.get_image_features, inputs, *names)
    videos = _features(
        getattr(model, "get_video_features", _no_video), inputs, "pixel_values_videos"
    )
    frame = (-(-crop[0] // 2), -(-crop[1] // 2))
    newline = model.model.image_newline.detach()
    masks = [newline_mask(rows, newline) for rows in images + videos]
    shapes = [crop] * len(images) + [frame] * len(videos)
    items = [
        EncodedItem(rows, mask, packed_grids(mask, shape))
        for rows, mask, shape in zip(images + videos, masks, shapes, strict=True)
    ]
    return items[: len(images)], items[len(images) :]


def _encode_qwen(model: Any, inputs: dict[str, Any]) -> tuple[list[EncodedItem], ...]:
    merge = model.config.vision_config.spatial_merge_size
    encoded = []
    for get, pixels, grid_thw in (
        (model.get_image_features, "pixel_values", "image_grid_thw"),
        (model.get_video_features, "pixel_values_videos", "video_grid_thw"),
    ):
        rows = _features(get, inputs, pixels, grid_thw)
        shapes = inputs[grid_thw].tolist() if rows else []
        encoded.append(
            [
                EncodedItem(of_item, None, ((height // merge, width // merge),) * frames)
                for of_item, (frames, height, width) in zip(rows, shapes, strict=True)
            ]
        )
    return tuple(encoded)


def _no_video(**kwargs: Any) -> Any:
    raise ValueError("this family takes no video")


FAMILIES: dict[str, Callable[[Any, dict[str, Any]], tuple[list[EncodedItem], ...]]] = {
    "llava": _encode_llava,
    "llava_next": _encode_packed,
    "llava_onevision": _encode_packed,
    "qwen2_vl": _encode_qwen,
    "qwen2_5_vl": _encode_qwen,
}
"""model_type -> (model, processor's output) -> items of the images, items of the videos."""
