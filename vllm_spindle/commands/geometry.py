"""A model's shape from its ``config.json``, without its weights and without vLLM."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class ModelGeometry:
    """What the KV cache's size depends on.

    Attributes:
        num_layers: decoder layers.
        num_heads: query heads of a layer.
        num_kv_heads: key-value heads of a layer.
        head_size: width of a head.
        dtype: of the cache. vLLM's ``auto`` is the model's own, but bfloat16 for float32 weights.
        max_len: longest prompt and output together, tokens; None if the model does not say.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: str
    max_len: int | None

    @property
    def num_queries_per_kv(self) -> int:
        """Query heads that share a kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes in one layer: its key and its value."""
        return 2 * self.num_kv_heads * self.head_size * DTYPE_BYTES[self.dtype]


def read_geometry(model: str, dtype: str | None = None) -> ModelGeometry:
    """The shape of a model.

    Args:
        model: folder, or name on the Hugging Face hub.
        dtype: of the cache; None for the model's own.

    Raises:
        ValueError: if there is no such model, or its configuration lacks what is needed.
    """
    config = _text_config(model)
    try:
        num_heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
        own_dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
        dtype = dtype or ("bfloat16" if own_dtype == "float32" else own_dtype)
        geometry = ModelGeometry(
            num_layers=config.num_hidden_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            dtype=dtype,
            max_len=getattr(config, "max_position_embeddings", None),
        )
    except AttributeError as error:
        raise ValueError(
            f"MODEL={model}: its config.json has no {error.name!r}, so this is no decoder with a "
            "KV cache; spindle serves decoder-only language models"
        ) from None
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"--dtype={dtype}: must be one of {', '.join(DTYPE_BYTES)}")
    return geometry


def _text_config(model: str) -> Any:
    from transformers import AutoConfig  # seconds to import: only where it is used

    if Path(model).is_dir():
        path = Path(model) / "config.json"
        if not path.is_file():
            raise ValueError(f"MODEL={model}: the folder has no config.json; give a model's folder")
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"MODEL={model}: config.json is not valid JSON: {error}") from None
    try:
        return AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"MODEL={model}: cannot read its configuration ({reason}); give the folder of a "
            "model, or a name that the Hugging Face hub or your cache of it knows"
        ) from None
