"""Write the model as vLLM and transformers both load it, offline."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from batches import PIXEL_MEAN, PIXEL_STD
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration, LlavaProcessor

from vllm_covipal.evaluation import scenes, shapes
from vllm_covipal.evaluation.scenes import SHAPES_WORLD, World

WEIGHTS = "model.safetensors"
TOWER, HUB_TOWER = "vision_tower.", "vision_tower.vision_model."


def build_processor(world: World = SHAPES_WORLD) -> LlavaProcessor:
    """Image processor, tokenizer and chat template."""
    image_processor = CLIPImageProcessor(
        size={"height": world.image_pixels, "width": world.image_pixels},
        do_center_crop=False,
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=shapes.build_tokenizer(),
        patch_size=scenes.CELL_PIXELS,
        vision_feature_select_strategy="default",
        chat_template=shapes.CHAT_TEMPLATE,
        image_token=shapes.IMAGE,
        num_additional_image_tokens=1,  # the tower's class token, which "default" drops again
    )


def save(
    model: LlavaForConditionalGeneration,
    out: Path,
    provenance: dict[str, object],
    world: World = SHAPES_WORLD,
) -> None:
    """Weights in bfloat16, configs, processor, and where it all comes from.

    transformers 5 saves ``vision_tower.embeddings``; checkpoints on the hub, and so vLLM, say
    ``vision_tower.vision_model.embeddings``. transformers reads both, so the file has the latter.
    """
    model = model.to(torch.bfloat16).eval()
    model.generation_config.do_sample = False
    model.save_pretrained(out)
    weights = {
        key.replace(TOWER, HUB_TOWER, 1) if key.startswith(TOWER) else key: value
        for key, value in load_file(out / WEIGHTS).items()
    }
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    (out / WEIGHTS).chmod(0o644)  # safetensors leaves it to its owner alone
    build_processor(world).save_pretrained(out)
    (out / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
