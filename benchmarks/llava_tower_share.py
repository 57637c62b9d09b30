"""How much of LLaVA-1.5-7B's encode + prefill is its vision tower, by the time of one layer each.

    OMP_NUM_THREADS=1 python benchmarks/llava_tower_share.py --out FILE

Transformers' own layers at the model's true sizes, random bfloat16 weights, 576 visual tokens and
32 of text; a layer's median time times its number. Embeddings, norms outside layers and the last
token's logits are left out on both sides. The tower of ``vllm-covipal bench``'s made model is sized
by this.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

IMAGE_TOKENS, TEXT_TOKENS, VISION_LAYERS, LAYERS = 577, 32, 23, 32


def seconds(call: Callable[[], object], repeats: int = 7) -> float:
    """Median of a few calls, after one that warms up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.inference_mode()
def measure() -> dict[str, float]:
    """Seconds of one layer of each kind, and of the projector."""
    from transformers import CLIPVisionConfig, LlamaConfig
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    vision = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_attention_heads=16)
    text = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
    for config in (vision, text):
        config._attn_implementation = "sdpa"
    tower = CLIPEncoderLayer(vision).bfloat16().eval()
    decoder = LlamaDecoderLayer(text, 0).bfloat16().eval()
    patches = torch.randn(1, IMAGE_TOKENS, 1024).bfloat16()
    num_tokens = IMAGE_TOKENS - 1 + TEXT_TOKENS
    tokens = torch.randn(1, num_tokens, 4096).bfloat16()
    rotary = LlamaRotaryEmbedding(text)(tokens, torch.arange(num_tokens).unsqueeze(0))
    projector = torch.nn.Sequential(
        torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 4096)
    ).bfloat16()
    return {
        "vision_layer": seconds(lambda: tower(patches, attention_mask=None)),
        "decoder_layer": seconds(lambda: decoder(tokens, position_embeddings=rotary)),
        "projector": seconds(lambda: projector(patches[:, 1:])),
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    from vllm_covipal.bench.provenance import provenance

    torch.set_num_threads(1)
    layers = measure()
    encode = layers["vision_layer"] * VISION_LAYERS + layers["projector"]
    prefill = layers["decoder_layer"] * LAYERS
    report = {
        "seconds": layers,
        "encode_share": encode / (encode + prefill),
        "provenance": provenance(),
    }
    Path(args.out).write_text(json.dumps(report, indent=2), encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
