"""A LLaVA-1.5 made on the spot, for timing: configuration, tokenizer and processor, no weights.

vLLM draws the weights when it loads the folder (``load_format="dummy"``). Time does not depend on
them: every selector takes as many steps for one picture as for another.

The vision tower takes the share of encode + prefill that CLIP ViT-L/14 and the projector take in
LLaVA-1.5-7B, by the time of one layer of each kind on a CPU (``benchmarks/llava_tower_share.py``:
7.1 %). Pruning saves nothing of the tower, so a larger one flatters no figure.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vllm_covipal.bench.requests import WORDS

ARCHITECTURE = "LlavaForConditionalGeneration"
MODEL_SPECIAL = ["</s>", "<unk>", "<image>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }} : "
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} "
    "{% else %}<image> {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT :{% endif %}"
)
PATCH_SIZE = 14


@dataclass(frozen=True)
class RandomLlava:
    """Sizes of the model."""

    image_size: int = 336
    hidden_size: int = 1024
    num_layers: int = 12
    head_size: int = 128
    intermediate_size: int = 2752
    vocab_size: int = 32_064
    vision_hidden_size: int = 352
    vision_num_layers: int = 4
    vision_head_size: int = 32

    @property
    def num_visual_tokens(self) -> int:
        """Of one image."""
        return (self.image_size // PATCH_SIZE) ** 2

    def num_parameters(self) -> dict[str, int]:
        """Of the layers of each part, biases and norms left out."""
        width, vision = self.hidden_size, self.vision_hidden_size
        return {
            "language model": self.num_layers * width * (4 * width + 3 * self.intermediate_size),
            "vision tower": self.vision_num_layers * 12 * vision**2,
            "projector": (vision + width) * width,
        }


def write_random_llava(folder: Path, sizes: RandomLlava) -> None:
    """Write what vLLM needs to start the model, without its weights."""
    text = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.hidden_size // sizes.head_size,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=sizes.vision_hidden_size,
        intermediate_size=4 * sizes.vision_hidden_size,
        num_hidden_layers=sizes.vision_num_layers,
        num_attention_heads=sizes.vision_hidden_size // sizes.vision_head_size,
        image_size=sizes.image_size,
        patch_size=PATCH_SIZE,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=MODEL_SPECIAL.index("<image>"),
        image_seq_length=sizes.num_visual_tokens,
        architectures=[ARCHITECTURE],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    side = {"height": sizes.image_size, "width": sizes.image_size}
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": sizes.image_size}, crop_size=side),
        _tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def write_random_ppm(folder: Path, model: str, seed: int = 0) -> None:
    """Write a pruning module of the default size for a model, untrained: its choice means nothing.

    Raises:
        ValueError: if the model's configuration cannot be read, or is not one of an LVLM.
    """
    import torch
    from transformers import AutoConfig

    from vllm_covipal.core.fingerprint import fingerprint
    from vllm_covipal.core.pruner import PruningModule, PruningModuleConfig
    from vllm_covipal.core.pruner_files import save_pruning_module

    try:
        config = AutoConfig.from_pretrained(model).to_dict()
    except OSError as error:
        raise ValueError(f"cannot read the configuration of {model}: {error}") from None
    mark = fingerprint(config)
    text: dict[str, Any] = config.get("text_config") or config
    torch.manual_seed(seed)
    module = PruningModule(
        PruningModuleConfig.for_hidden_size(
            text["hidden_size"], fingerprint=mark, trained_for="nothing: random weights, for timing"
        )
    )
    save_pruning_module(module, folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word that the benchmark's prompts use."""
    words = [*MODEL_SPECIAL, "USER", "ASSISTANT", ":", *WORDS]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<image>"],
        model_specific_special_tokens={"image_token": "<image>"},
    )
