"""Random-weight models for tests of equality and counts; never for quality."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 512


def write_llama(
    folder: Path,
    *,
    num_layers: int = 6,
    num_heads: int = 8,
    num_kv_heads: int = 2,
    head_size: int = 32,
    max_len: int = 4096,
    seed: int = 0,
    **overrides: object,
) -> Path:
    """Write a random Llama of bf16 weights, without a tokenizer, and return its folder.

    Weights are drawn wider than usual, so that attention is peaked and a wrong or missing token
    changes the output.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_size,
        max_position_embeddings=max_len,
        rope_theta=500_000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        **overrides,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(12)
            elif weight.dim() == 2:
                weight.mul_(4)
    model.save_pretrained(folder)
    return folder


def prompts(count: int, lengths: list[int], *, seed: int = 0) -> list[dict[str, list[int]]]:
    """``count`` prompts of random token ids, lengths taken in turn, as vLLM token prompts."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "prompt_token_ids": torch.randint(
                0, VOCAB_SIZE, (lengths[i % len(lengths)],), generator=generator
            ).tolist()
        }
        for i in range(count)
    ]


def config_of(folder: Path) -> dict[str, object]:
    """The model's config.json."""
    return json.loads((folder / "config.json").read_text())


def head_shares(*, num_layers: int, num_heads: int) -> dict[str, list[list[float]]]:
    """A profile of no model: at every mean share, some heads keep most and some little."""
    points = {}
    for mean in (0.75, 0.5, 0.25, 0.1):
        uneven = [
            [(1 + layer * 5 + head * 3) % 7 for head in range(num_heads)]
            for layer in range(num_layers)
        ]
        total = sum(map(sum, uneven))
        scale = mean * num_layers * num_heads / total
        # Half-way to even, so that none passes 1 by much; what does, is cut.
        shares = [[min(1.0, (scale * each + mean) / 2) for each in heads] for heads in uneven]
        found = sum(map(sum, shares)) / (num_layers * num_heads)
        points[f"{found:.6f}"] = shares
    return points
