"""The model's own rotary table: what turned its keys, and turns a codebook's entries."""

from typing import Any

import torch
from torch import Tensor

TOLERANCE = 0.02  # a bf16 table is exact to 2 ** -8


def rotary_table(model: Any, layer_name: str) -> Tensor:
    """Cosines and sines of the rotary embedding beside an attention layer.

    Args:
        model: the vLLM model.
        layer_name: of the attention layer, for example ``model.layers.0.self_attn.attn``.

    Returns:
        [P, D], cosines then sines of D / 2 angles.

    Raises:
        ValueError: if keys are not turned by a plain NeoX-style rotation of the whole head.
    """
    name = layer_name.rpartition(".")[0]
    embedding = getattr(model.get_submodule(name), "rotary_emb", None)
    table = getattr(embedding, "cos_sin_cache", None)
    if table is None:
        raise _refusal(name, "no rotary embedding with a table was found beside the attention")
    if not getattr(embedding, "is_neox_style", True):
        raise _refusal(name, "interleaved (GPT-J style) rotary embedding")
    if embedding.rotary_dim != embedding.head_size:
        raise _refusal(name, "partial rotary embedding")
    if getattr(embedding, "mrope_section", None):
        raise _refusal(name, "multimodal rotary embedding (M-RoPE)")
    cos, sin = table.float().chunk(2, dim=-1)
    if (cos.square() + sin.square() - 1).abs().max() > TOLERANCE:
        raise _refusal(name, "a rotary embedding that also scales (YaRN)")
    return torch.as_tensor(table)


def _refusal(name: str, reason: str) -> ValueError:
    return ValueError(
        f"spindle: method merge or both cannot serve {name}: {reason}; use method evict"
    )
