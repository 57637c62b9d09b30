"""What each selector keeps of a picture for a question, side by side."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from vllm_covipal import hf
from vllm_covipal.commands.inspect_picture import Panel, View, draw_sheet, light
from vllm_covipal.training.encode import chat_prompt


def kept_sheet(
    model: Any,
    processor: Any,
    image: Image.Image,
    question: str,
    selectors: Sequence[Any],
    keep_ratios: Sequence[float],
) -> Image.Image:
    """A line of pictures for each ratio: everything, then what each selector keeps.

    Raises:
        ValueError: if it is not known where the model's visual tokens lie.
    """
    prompt = chat_prompt(processor, question, 1)
    encoded = hf.encode_prompt(model, processor, prompt, images=[image])
    views = _views(image, encoded, processor.image_processor)
    lines = []
    for keep_ratio in keep_ratios:
        (item,) = hf.visual_items(model, encoded, keep_ratio)
        total = item.num_candidates
        panels = [Panel(f"all {total} tokens", light(views, set(range(total))))]
        place = {row: i for i, row in enumerate(item.candidate_rows().tolist())}
        for selector in selectors:
            (item,) = hf.visual_items(model, encoded, keep_ratio, selector.max_text_tokens)
            rows = selector.select([item])[0].tolist()
            kept = {place[row] for row in rows if row in place}
            label = f"{selector.name}  {keep_ratio:g}: {len(kept)} of {total}"
            panels.append(Panel(label, light(views, kept)))
        lines.append(panels)
    return draw_sheet(question, lines)


def _views(image: Image.Image, encoded: Any, image_processor: Any) -> list[View]:
    """A picture for each grid of the item: what its patches show.

    LLaVA's towers see a crop first, which may leave a margin of the image out; every other grid
    covers the whole image.
    """
    (item,) = encoded.items
    if not item.grids:
        raise ValueError("where this model's visual tokens lie in the picture is not known")
    pixels = encoded.inputs["pixel_values"]
    views = [View(image, grid) for grid in item.grids]
    if pixels.dim() >= 4:  # pictures [..., 3, H, W]; Qwen's come as flattened patches
        crop = pixels.reshape(-1, *pixels.shape[-3:])[0]
        views[0] = View(_denormalised(crop, image_processor), item.grids[0])
    return views


def _denormalised(pixels: Any, image_processor: Any) -> Image.Image:
    """The picture that an image processor made [3, H, W] of."""
    shown = pixels.float().cpu().permute(1, 2, 0)
    if image_processor.do_normalize:
        mean, std = image_processor.image_mean, image_processor.image_std
        shown = shown * shown.new_tensor(std) + shown.new_tensor(mean)
    if image_processor.do_rescale:
        shown = shown / image_processor.rescale_factor
    return Image.fromarray(shown.round().clamp(0, 255).byte().numpy())
