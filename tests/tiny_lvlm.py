"""Random-weight vision-language models with processors, for tests of equality and counts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SiglipVisionConfig,
)

WIDTH = 64
SIDE = 32
PATCH = 8
SPECIAL = ["<s>", "</s>", "<unk>", "<image>", "<video>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
WORDS = "USER : ASSISTANT what is the color of red blue circle square ? . left right Hello You are"
VOCABULARY = SPECIAL + WORDS.split()
SIZE = 96
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }} : "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} "
    "{% else %}PLACEHOLDER {% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT : {% endif %}"
)
IDS = {token: i for i, token in enumerate(VOCABULARY)}

Pair = tuple[Any, Any]


def chat_template(family: str) -> str:
    """A template that puts placeholders where the message has them."""
    return CHAT_TEMPLATE.replace("PLACEHOLDER", placeholder(family))


def other_template(family: str) -> str:
    """One whose answers begin otherwise than those of the model's own."""
    return (
        chat_template(family)
        .replace("ASSISTANT :", "You are")
        .replace(
            "{{ message['role'] | upper }} :",
            "{{ 'USER :' if message['role'] == 'user' else 'You are' }}",
        )
    )


def placeholder(family: str, modality: str = "image") -> str:
    """What stands for an image or a video in a prompt."""
    if family.startswith("qwen"):
        return f"<|vision_start|><|{modality}_pad|><|vision_end|>"
    return f"<{modality}>"


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of a few words."""
    backend = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    special = [token for token in SPECIAL if token not in ("<s>", "</s>", "<unk>")]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=special,
        model_specific_special_tokens={"image_token": "<image>"},
    )


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Random pixels, none dark."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(64, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def clip(num_frames: int, width: int, height: int, seed: int = 0) -> Any:
    """Frames of random pixels, [F, height, width, 3]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_frames, height, width, 3)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).numpy()


def _text(kind: type, **changes: Any) -> Any:
    return kind(
        vocab_size=SIZE,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,  # heads of 32, the smallest that vLLM's CPU attention takes
        num_key_value_heads=1,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=IDS["</s>"],
        **changes,
    )


def _vision(kind: type) -> Any:
    return kind(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )


def _wide(model: torch.nn.Module) -> Any:
    """Weights drawn wider than usual, so that a wrong or missing token changes the output."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2 and "embed_tokens" not in name:
                weight.mul_(8)
            elif "embed_tokens" in name:
                weight.mul_(30)
    return model.eval()


def llava() -> Pair:
    """LLaVA-1.5: 16 patches, one crop."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=_vision(CLIPVisionConfig),
        text_config=_text(LlamaConfig),
        image_token_id=IDS["<image>"],
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size)
    processor = LlavaProcessor(
        images,
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("llava"),
    )
    return _wide(LlavaForConditionalGeneration(config)), processor


PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


def llava_next() -> Pair:
    """LLaVA-NeXT: a base crop, up to 2 x 2 tiles, newlines."""
    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config=_vision(CLIPVisionConfig),
        text_config=_text(LlamaConfig),
        image_token_id=IDS["<image>"],
        image_grid_pinpoints=PINPOINTS,
    )
    images = LlavaNextImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
    )
    processor = LlavaNextProcessor(
        images,
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("llava_next"),
    )
    return _wide(LlavaNextForConditionalGeneration(config)), processor


def llava_onevision() -> Pair:
    """LLaVA-OneVision: as NeXT, several images one crop each, video pooled two by two."""
    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        vision_config=_vision(SiglipVisionConfig),
        text_config=_text(Qwen2Config),
        image_token_id=IDS["<image>"],
        video_token_id=IDS["<video>"],
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_9",
    )
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        tokenizer(),
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=chat_template("llava_onevision"),
    )
    return _wide(LlavaOnevisionForConditionalGeneration(config)), processor


def _qwen_parts() -> tuple[Any, Any, Any]:
    tokens = tokenizer()
    tokens.image_token, tokens.video_token = "<|image_pad|>", "<|video_pad|>"
    tokens.image_token_id, tokens.video_token_id = IDS["<|image_pad|>"], IDS["<|video_pad|>"]
    size = {"shortest_edge": 16 * 16, "longest_edge": 96 * 96}
    sizes = {"patch_size": PATCH, "merge_size": 2, "size": size}
    videos = Qwen2VLVideoProcessor(**sizes, do_sample_frames=False)
    return Qwen2VLImageProcessor(**sizes), tokens, videos


def _qwen_ids() -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10_000.0}
    return {
        "text_config": _text(Qwen2Config, rope_parameters=rope).to_dict(),
        "image_token_id": IDS["<|image_pad|>"],
        "video_token_id": IDS["<|video_pad|>"],
        "vision_start_token_id": IDS["<|vision_start|>"],
        "vision_end_token_id": IDS["<|vision_end|>"],
    }


def qwen2_vl() -> Pair:
    """Qwen2-VL: any size, patches merged two by two, M-RoPE."""
    torch.manual_seed(0)
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": PATCH}
    vision |= {"hidden_size": WIDTH}
    config = Qwen2VLConfig(vision_config=vision, **_qwen_ids())
    images, tokens, videos = _qwen_parts()
    processor = Qwen2VLProcessor(images, tokens, videos, chat_template=chat_template("qwen2_vl"))
    return _wide(Qwen2VLForConditionalGeneration(config)), processor


def qwen2_5_vl() -> Pair:
    """Qwen2.5-VL: as Qwen2-VL, with windows in the tower."""
    torch.manual_seed(0)
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    vision |= {"patch_size": PATCH, "out_hidden_size": WIDTH, "window_size": 4 * PATCH}
    vision |= {"fullatt_block_indexes": [1], "tokens_per_second": 2}
    config = Qwen2_5_VLConfig(vision_config=vision, **_qwen_ids())
    images, tokens, videos = _qwen_parts()
    processor = Qwen2_5_VLProcessor(images, tokens, videos, chat_template=chat_template("qwen2_vl"))
    return _wide(Qwen2_5_VLForConditionalGeneration(config)), processor


FAMILIES: dict[str, Callable[[], Pair]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
}


def write(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the model and its processor where vLLM can load them, and return the folder."""
    model, processor = FAMILIES[family]()
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    # transformers 5.19 drops a level that vLLM's LLaVA expects, as the hub's checkpoints have it.
    save_file(
        {
            name.replace("vision_tower.", "vision_tower.vision_model."): weight
            for name, weight in weights.items()
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def write_samples(folder: Path, num_samples: int) -> Path:
    """A file of samples in the LLaVA format, a picture of its own beside it for each."""
    lines = []
    for i in range(num_samples):
        picture(40, 40, seed=i).save(folder / f"{i}.png")
        turns = [
            {"from": "human", "value": "<image>\nwhat is the color ?"},
            {"from": "gpt", "value": "blue" if i % 2 else "red"},
        ]
        lines.append(json.dumps({"id": i, "image": f"{i}.png", "conversations": turns}))
    path = folder / "samples.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
