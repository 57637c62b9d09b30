"""How each family of LVLMs lays out the rows of an image or video.

Two sides ask: the processor, how many rows are structure (integers, before the pixels are
encoded), and the worker, which rows they are and what grids the others fill.

Shapes: N rows of an item, D width of the language model.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.parse import ImageProcessorItems

from vllm_covipal.core.geometry import newline_mask, packed_grids


@dataclass(frozen=True, slots=True)
class Layout:
    """Which rows of an item are structure, and the grids that its candidates fill in order."""

    structure_mask: Tensor | None
    """True = structure. [N] bool."""
    grids: tuple[tuple[int, int], ...]


class Family(ABC):
    """One family's answers."""

    flat_fields: Mapping[str, str] = {}
    """Fields whose items lie one after the other, with the field that holds their grids."""

    @abstractmethod
    def placeholder_ids(self, hf_config: Any) -> dict[str, int]:
        """Token that stands for one item in the prompt, by modality."""

    def num_structure_rows(self, info: Any, modality: str, mm_items: Any, item_idx: int) -> int:
        """Rows of an item that are always kept, before it is encoded."""
        return 0

    @abstractmethod
    def layout(self, model: Any, modality: str, rows: Tensor, fields: Mapping[str, Any]) -> Layout:
        """Structure and grids of an encoded item.

        Args:
            model: vLLM's model.
            modality: image or video.
            rows: the item's visual embeddings. [N, D].
            fields: the item's own processor fields, without a batch dimension.
        """

    @abstractmethod
    def num_encoder_rows(self, model: Any, modality: str, fields: Mapping[str, Any]) -> int:
        """Rows that the vision tower works on for this item: what bounds a batch's memory."""

    def check_placeholders(  # noqa: B027
        self, hf_config: Any, prompt_ids: Sequence[int], ranges: Mapping[str, Sequence[Any]]
    ) -> None:
        """Refuse a prompt whose pruned items cannot be placed; most families place any.

        Args:
            hf_config: the model's.
            prompt_ids: the prompt with its placeholders.
            ranges: of the placeholders, by modality.

        Raises:
            VLLMValidationError: HTTP 400.
        """


class LlavaFamily(Family):
    """LLaVA-1.5: one square image, no structure."""

    def placeholder_ids(self, hf_config: Any) -> dict[str, int]:
        """The ``<image>`` token."""
        return {"image": hf_config.image_token_index}

    def layout(self, model: Any, modality: str, rows: Tensor, fields: Mapping[str, Any]) -> Layout:
        """One grid."""
        return Layout(None, (_square(rows.shape[0]),))

    def num_encoder_rows(self, model: Any, modality: str, fields: Mapping[str, Any]) -> int:
        """One crop."""
        return _crop_rows(model)


class LlavaNextFamily(Family):
    """LLaVA-NeXT: a base crop, then the unpadded picture with a newline after each row."""

    def placeholder_ids(self, hf_config: Any) -> dict[str, int]:
        """The ``<image>`` token."""
        return {"image": hf_config.image_token_index}

    def num_structure_rows(self, info: Any, modality: str, mm_items: Any, item_idx: int) -> int:
        """Newlines: one a row of the unpadded picture."""
        size = mm_items.get_items("image", ImageProcessorItems).get_image_size(item_idx)
        encoder = info.get_vision_encoder_info()
        crops_high, crops_wide = get_anyres_image_grid_shape(
            image_size=(size.height, size.width),
            grid_pinpoints=info.get_hf_config().image_grid_pinpoints,
            patch_size=encoder.get_image_size(),
        )
        _, num_newlines = info._get_num_unpadded_features(
            original_height=size.height,
            original_width=size.width,
            npatches=encoder.get_patch_grid_length(),
            num_patch_height=crops_high,
            num_patch_width=crops_wide,
        )
        return int(num_newlines)

    def layout(self, model: Any, modality: str, rows: Tensor, fields: Mapping[str, Any]) -> Layout:
        """The newline parameter marks its rows; the base crop comes first."""
        mask = newline_mask(rows, model.image_newline)
        return Layout(mask, packed_grids(mask, (_grid_side(model),) * 2))

    def num_encoder_rows(self, model: Any, modality: str, fields: Mapping[str, Any]) -> int:
        """All crops or frames."""
        pixels = fields["pixel_values" if modality == "image" else "pixel_values_videos"]
        return _crop_rows(model) * int(pixels.shape[0])


class LlavaOnevisionFamily(LlavaNextFamily):
    """LLaVA-OneVision: images as LLaVA-NeXT; a video is pooled frames and one newline."""

    def placeholder_ids(self, hf_config: Any) -> dict[str, int]:
        """The ``<image>`` and ``<video>`` tokens."""
        return {"image": hf_config.image_token_index, "video": hf_config.video_token_index}

    def num_structure_rows(self, info: Any, modality: str, mm_items: Any, item_idx: int) -> int:
        """Newlines of an image; the one at a video's end."""
        if modality == "video":
            return 1
        return super().num_structure_rows(info, modality, mm_items, item_idx)

    def layout(self, model: Any, modality: str, rows: Tensor, fields: Mapping[str, Any]) -> Layout:
        """Frames share one pooled grid."""
        if modality == "image":
            return super().layout(model, modality, rows, fields)
        mask = newline_mask(rows, model.image_newline)
        side = math.ceil(_grid_side(model) / getattr(model.config, "spatial_pool_stride", 2))
        return Layout(mask, packed_grids(mask, (side, side)))


class QwenVLFamily(Family):
    """Qwen2-VL and Qwen2.5-VL: frames of merged patches, no structure among them."""

    flat_fields = {
        "pixel_values": "image_grid_thw",
        "image_embeds": "image_grid_thw",
        "pixel_values_videos": "video_grid_thw",
        "video_embeds": "video_grid_thw",
    }

    def placeholder_ids(self, hf_config: Any) -> dict[str, int]:
        """The image and video pads."""
        return {"image": hf_config.image_token_id, "video": hf_config.video_token_id}

    def layout(self, model: Any, modality: str, rows: Tensor, fields: Mapping[str, Any]) -> Layout:
        """One grid a frame."""
        frames, high, wide = fields[f"{modality}_grid_thw"].tolist()
        merge = model.config.vision_config.spatial_merge_size
        return Layout(None, ((high // merge, wide // merge),) * frames)

    def num_encoder_rows(self, model: Any, modality: str, fields: Mapping[str, Any]) -> int:
        """Merged patches, the unit of vLLM's encoder budget."""
        merge = model.config.vision_config.spatial_merge_size
        return int(fields[f"{modality}_grid_thw"].prod()) // merge**2

    def check_placeholders(
        self, hf_config: Any, prompt_ids: Sequence[int], ranges: Mapping[str, Sequence[Any]]
    ) -> None:
        """Text is what items and the answer are counted from, and pads are items (mrope.py)."""
        spans = sorted((r.offset, r.offset + r.length) for of in ranges.values() for r in of)
        if any(end == start for (_, end), (start, _) in zip(spans, spans[1:], strict=False)):
            raise VLLMValidationError(
                "two images or videos stand side by side in the prompt: put a token between them, "
                "as the chat template does (<|vision_end|><|vision_start|>)"
            )
        if any(end == len(prompt_ids) for _, end in spans):
            raise VLLMValidationError(
                "the prompt ends with an image or a video, so that the answer has no text to be "
                "counted from: put a token behind it, as the chat template does (<|vision_end|>)"
            )
        pads = set(self.placeholder_ids(hf_config).values())
        num_others = sum(token in pads for token in prompt_ids) - sum(e - s for s, e in spans)
        if num_others:
            raise VLLMValidationError(
                f"the prompt has {num_others} more image or video pads than images and videos "
                "take: a pad cannot be text where images are pruned"
            )


def _grid_side(model: Any) -> int:
    vision = model.config.vision_config
    return int(vision.image_size // vision.patch_size)


def _crop_rows(model: Any) -> int:
    return _grid_side(model) ** 2


def _square(num_rows: int) -> tuple[int, int]:
    side = math.isqrt(num_rows)
    return (side, side) if side * side == num_rows else (1, num_rows)
