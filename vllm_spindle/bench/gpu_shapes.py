"""Shapes of the models that ``bench gpu`` times: a config.json each, weights are dummies."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """A Llama's shape. ``head_size`` times ``num_heads`` need not be ``hidden_size``."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Of all layers, bfloat16."""
        return 2 * 2 * self.num_layers * self.num_kv_heads * self.head_size

    def write(self, folder: Path, max_model_len: int) -> None:
        """Write the model's config.json into an empty folder."""
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_size,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": max_model_len,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


SHAPES = {
    "llama-3.1-8b": ModelShape(4096, 14336, 32, 32, 8, 128, 128256),
    "tiny": ModelShape(128, 256, 6, 8, 2, 32, 512),
}
