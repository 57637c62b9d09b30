"""What a model's attention sees of a prompt and of its own greedy answer, layer by layer.

A transformers attention function of our own stands in for the model's: once to record, then to
replay the answer over reduced contexts. Nothing of the model's code is changed.
Shapes: K kv heads, G query heads per kv head, Q queries of the prompt's end, N answer tokens,
P prompt tokens, D head size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_spindle.calibration.attention import attend

ATTENTION = "spindle_calibration"
TOLERANCE = 0.02  # as ``engine/rotary_table.py``

Context = tuple[Tensor, Tensor, Tensor]
"""Keys (rotated) and values of the context tokens that are left, twice [K, C, D], and which of them
a kv head has, [K, C]."""


@dataclass(frozen=True)
class CapturedLayer:
    """One layer's attention inputs. Keys and values as the cache holds them, rounded to bf16.

    Attributes:
        queries: rotated, of the prompt's last Q tokens and of the answer's. [K, G, Q + N, D].
        keys: rotated. [K, P + N, D].
        values: [K, P + N, D].
        scale: softmax scale.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float


@dataclass(frozen=True)
class CapturedPrompt:
    """A prompt, the model's greedy answer, and what each layer saw.

    Attributes:
        answer: [N], int64; N at least 1. The last token's own answer is predicted, not taken.
        layers: shallow to deep.
        cos_sin: the model's rotary table. [P + N, D].
        logits: after each answer token, with nothing reduced. [N, V], float32.
    """

    prompt_len: int
    answer: Tensor
    layers: tuple[CapturedLayer, ...]
    cos_sin: Tensor
    logits: Tensor


def load_model(model: str, dtype: str) -> Any:
    """The model for one CPU process, with our attention function.

    Raises:
        ValueError: if transformers cannot load it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    from vllm_spindle.calibration.prompts import load_causal_model

    AttentionInterface.register(ATTENTION, _stock)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    return load_causal_model(model, dtype, attn_implementation=ATTENTION)


@torch.inference_mode()
def capture(model: Any, token_ids: Sequence[int], num_queries: int, num_new: int) -> CapturedPrompt:
    """Run one prompt and its greedy answer.

    Args:
        model: from ``load_model``.
        token_ids: the prompt. [P].
        num_queries: last prompt tokens whose queries are kept (Q).
        num_new: most answer tokens; the end of the text ends the answer.

    Raises:
        ValueError: if keys are not turned by a plain rotation of the whole head.
    """
    prompt = torch.tensor([list(token_ids)])
    prompt_len = prompt.shape[1]
    written = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_new + 1,
        do_sample=False,
        pad_token_id=0,
    )
    # The last token written is an answer that nothing follows.
    tokens = written[:, : max(prompt_len + 1, written.shape[1] - 1)]
    layers: list[CapturedLayer] = []

    def record(query: Tensor, key: Tensor, value: Tensor, scale: float, _: int) -> None:
        keys, values = key[0].bfloat16(), value[0].bfloat16()
        first = max(0, prompt_len - num_queries)
        queries = query[0].view(keys.shape[0], -1, *query.shape[2:])[:, :, first:]
        layers.append(CapturedLayer(queries.clone(), keys, values, scale))

    with _watching(record):
        logits = model(tokens, use_cache=False).logits[0, prompt_len:]
    return CapturedPrompt(
        prompt_len=prompt_len,
        answer=tokens[0, prompt_len:],
        layers=tuple(layers),
        cos_sin=rotary_table(model, tokens.shape[1], layers[0].keys.shape[-1]),
        logits=logits.float(),
    )


@torch.inference_mode()
def replay(
    model: Any, prompt: CapturedPrompt, contexts: Sequence[Context], num_context: Sequence[int]
) -> Tensor:
    """Logits after each answer token where each layer sees its own reduced context.

    Args:
        model: from ``load_model``.
        prompt: as captured.
        contexts: what is left of each layer's context.
        num_context: tokens of each layer that ``contexts`` stands for; later ones are dense.

    Returns:
        [N, V], float32.
    """

    def reduced(query: Tensor, key: Tensor, value: Tensor, scale: float, layer_idx: int) -> Tensor:
        layer, start = prompt.layers[layer_idx], num_context[layer_idx]
        dense = slice(start, prompt.prompt_len)
        queries = query[0].view(key.shape[1], -1, *query.shape[2:])
        outputs = attend(
            queries,
            *contexts[layer_idx],
            torch.cat([layer.keys[:, dense], key[0].bfloat16()], dim=1),
            torch.cat([layer.values[:, dense], value[0].bfloat16()], dim=1),
            scale,
        )
        return outputs.flatten(0, 1).transpose(0, 1).unsqueeze(0).to(query.dtype)

    positions = torch.arange(len(prompt.answer)) + prompt.prompt_len
    with _watching(reduced):
        answer = prompt.answer.unsqueeze(0)
        out = model(answer, position_ids=positions.unsqueeze(0), use_cache=False)
    return out.logits[0].float()


def rotary_table(model: Any, num_positions: int, head_size: int) -> Tensor:
    """Cosines, then sines, of D / 2 angles, as ``core/rotary.py`` wants them. [P, D].

    Raises:
        ValueError: for another than a plain NeoX-style rotation of the whole head.
    """
    embeddings = [m for name, m in model.named_modules() if name.endswith("rotary_emb")]
    if not embeddings:
        raise ValueError("the model has no rotary embedding: a codebook cannot merge its keys")
    positions = torch.arange(num_positions).unsqueeze(0)
    cos, sin = (table[0].float() for table in embeddings[0](torch.zeros(1), positions))
    half = head_size // 2
    is_plain = (
        cos.shape[-1] == head_size
        and torch.equal(cos[:, :half], cos[:, half:])
        and (cos.square() + sin.square() - 1).abs().max() < TOLERANCE
    )
    if not is_plain:
        raise ValueError(
            "the model turns its keys by another than a plain rotation of the whole head (partial, "
            "interleaved or scaled): a codebook cannot merge them; use method evict"
        )
    return torch.cat([cos[:, :half], sin[:, :half]], dim=-1)


_watcher: Callable[..., Tensor | None] | None = None


@contextmanager
def _watching(watcher: Callable[..., Tensor | None]) -> Iterator[None]:
    """Every attention call goes to ``watcher``; where it returns None, the stock one answers."""
    global _watcher
    _watcher = watcher
    try:
        yield
    finally:
        _watcher = None


def _stock(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function that transformers calls. query: [1, H, T, D]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if _watcher is not None:
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        outputs = _watcher(query, key, value, scale, module.layer_idx)
        if outputs is not None:
            return outputs, None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
