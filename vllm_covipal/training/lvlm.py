"""The frozen LVLM: loading, one layer's queries and keys, logits under a soft mask.

Shapes: B rows, T tokens of a row, D width, H query heads, K kv heads, S head size.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_covipal.hf_attention import attention_of_layer


@dataclass(frozen=True, slots=True)
class GuideAttention:
    """One layer's attention inputs, positions applied.

    Attributes:
        queries: [B, H, T, S].
        keys: [B, K, T, S].
        scale: of the scores.
    """

    queries: Tensor
    keys: Tensor
    scale: float


class _Captured(Exception):
    """Ends a forward pass at the guide layer: nothing above it is needed."""


def load_lvlm(path: str, dtype: str) -> tuple[Any, Any]:
    """The model, frozen, and its processor.

    Raises:
        ValueError: if they cannot be loaded, or the family is not one that serving supports.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    from vllm_covipal.hf_families import FAMILIES

    logging.disable_progress_bar()
    try:
        processor = AutoProcessor.from_pretrained(path)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model={path}: transformers cannot load it ({reason})") from None
    if model.config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"model={path}: a {model.config.model_type!r}; must be one of {known}")
    return model.eval().requires_grad_(False), processor


def decoder(model: Any) -> Any:
    """The language model inside, without its head."""
    return model.model.language_model


def default_guide_layer(model: Any) -> int:
    """Two thirds of the way up: the paper's example is layer 16 of a 28-layer model."""
    return 2 * len(decoder(model).layers) // 3


@torch.no_grad()
def guide_attention(
    model: Any, embeddings: Tensor, positions: Tensor, mask: Tensor, layer_idx: int
) -> GuideAttention:
    """Queries and keys of one layer; the layers above do not run, and no weights are made.

    Args:
        model: the LVLM.
        embeddings: [B, T, D].
        positions: [B, T], or [3, B, T] under M-RoPE.
        mask: True where a query may see a key. [B, 1, T, T].
        layer_idx: the guide layer.
    """
    captured: list[GuideAttention] = []

    def capture(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> None:
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        captured.append(GuideAttention(query, key, scale))
        raise _Captured

    guide = decoder(model).layers[layer_idx].self_attn
    with attention_of_layer(guide, capture), suppress(_Captured):
        decoder(model)(
            inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, use_cache=False
        )
    return captured[0]


def biased_mask(allowed: Tensor, key_bias: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive mask: the key's bias where it may be seen, the lowest number elsewhere.

    Args:
        allowed: [B, 1, T, T], bool.
        key_bias: 0 for keys that are not visual. [B, T].
        dtype: of the model's embeddings.

    Returns:
        [B, 1, T, T]; the gradient reaches ``key_bias``.
    """
    lowest = torch.finfo(dtype).min
    bias = key_bias[:, None, None, :].to(dtype)
    return torch.where(allowed, bias, lowest)


def answer_logits(
    model: Any, embeddings: Tensor, positions: Tensor, mask: Tensor, where: Tensor
) -> Tensor:
    """Next-token logits at some tokens.

    Args:
        embeddings: [B, T, D].
        positions: [B, T], or [3, B, T].
        mask: from ``biased_mask``.
        where: row and token of each. [A, 2], int64.

    Returns:
        [A, vocabulary], float32.
    """
    hidden = decoder(model)(
        inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[where[:, 0], where[:, 1]]).float()  # type: ignore[no-any-return]
