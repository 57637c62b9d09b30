"""Running a language model layer by layer, visual tokens leaving on the way.

Shapes: T tokens left, D width, H query heads, K kv heads, S head size, V visual tokens left.

No KV cache: each new token runs the prompt again, with the choice made anew from the prompt's own
rows, which do not see what comes after them. Slow and plain, for models of a few layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_covipal.hf import EncodedPrompt
from vllm_covipal.hf_attention import attention_of_layer


class Unreachable(ValueError):
    """The method cannot keep so few tokens on average: its first layers see them all."""


@dataclass(slots=True)
class LayerState:
    """What the layers have left when one of them is about to run.

    Attributes:
        hidden: [T, D].
        visual: places of the visual tokens among the T, ascending. [V].
        num_prompt: prompt tokens left; the last of them is the prompt's last.
        attention: weights of the layer before, mean of heads. [T, T].
        layer_idx: of the layer about to run.
    """

    hidden: Tensor
    visual: Tensor
    num_prompt: int
    attention: Tensor
    layer_idx: int


Drop = Callable[[LayerState], Tensor | None]
"""Places in ``visual`` that stay, any order; None for all. Called before every layer but the
first."""


@torch.no_grad()
def answer(
    model: Any, encoded: EncodedPrompt, drop: Drop, max_new_tokens: int
) -> tuple[list[int], float]:
    """Greedy continuation, and the visual tokens a layer saw, mean of layers.

    Args:
        model: the LVLM.
        encoded: one picture's prompt.
        drop: called before each layer.
        max_new_tokens: at most.
    """
    embeddings = model.get_input_embeddings()(encoded.prompt_ids).clone()
    (item,) = encoded.items
    embeddings[item.start : item.start + len(item.rows)] = item.rows.to(embeddings.dtype)
    eos = model.generation_config.eos_token_id
    stop = set(eos) if isinstance(eos, list) else {eos}
    said: list[int] = []
    while len(said) < max_new_tokens:
        new = model.get_input_embeddings()(torch.tensor(said, dtype=torch.int64))
        logits, seen = _next_logits(model, encoded, torch.cat([embeddings, new]), drop)
        token = int(logits.argmax())
        if token in stop:
            break
        said.append(token)
    return said, sum(seen) / len(seen)


def _next_logits(
    model: Any, encoded: EncodedPrompt, embeddings: Tensor, drop: Drop
) -> tuple[Tensor, list[int]]:
    """Logits after the last token, and the visual tokens that each layer saw."""
    decoder = model.model.language_model
    (item,) = encoded.items
    num_prompt, num_tokens = len(encoded.prompt_ids), len(embeddings)
    visual = torch.arange(item.start, item.start + len(item.rows))
    if item.structure_mask is not None:
        visual = visual[~item.structure_mask]
    positions = _positions(encoded, num_tokens)
    cos, sin = decoder.rotary_emb(embeddings[None], positions)
    state = LayerState(embeddings, visual, num_prompt, embeddings.new_zeros(0), 0)
    seen = []
    for layer_idx, layer in enumerate(decoder.layers):
        state.layer_idx = layer_idx
        chosen = drop(state) if layer_idx else None
        if chosen is not None:
            kept = torch.ones(len(state.hidden), dtype=torch.bool)
            kept[state.visual] = False
            kept[state.visual[chosen]] = True
            state.num_prompt -= int((~kept).sum())
            state.hidden, cos, sin = state.hidden[kept], cos[..., kept, :], sin[..., kept, :]
            place = kept.cumsum(0) - 1
            state.visual = place[state.visual[chosen.sort().values]]
        seen.append(len(state.visual))
        weights: list[Tensor] = []
        with attention_of_layer(layer.self_attn, _recording(weights)):
            output = layer(state.hidden[None], position_embeddings=(cos, sin), attention_mask=None)
        state.hidden = (output[0] if isinstance(output, tuple) else output)[0]
        state.attention = weights[0]
    last = decoder.norm(state.hidden[-1:])
    return model.lm_head(last)[0], seen


def _positions(encoded: EncodedPrompt, num_tokens: int) -> Tensor:
    """Original positions, new tokens after the prompt's. [1, T] or [3, 1, T]."""
    num_new = num_tokens - len(encoded.prompt_ids)
    if encoded.positions is None:
        return torch.arange(num_tokens)[None]
    new = torch.arange(encoded.next_position, encoded.next_position + num_new)
    return torch.cat([encoded.positions, new.expand(3, -1)], dim=1)[:, None]


def _recording(weights: list[Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """Plain causal attention that leaves its weights, mean of heads, in ``weights``. [T, T]."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        repeats = query.shape[1] // key.shape[1]
        keys, values = (rows.repeat_interleave(repeats, dim=1) for rows in (key, value))
        scores = (query @ keys.mT).float() * scale
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        each = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        weights.append(each[0].mean(0))
        return (each.to(value.dtype) @ values).transpose(1, 2), None

    return attend


def share_for_average(num_layers: int, first: int, keep_ratio: float) -> float:
    """Share that layers from ``first`` on keep, so that the mean over layers is ``keep_ratio``.

    Raises:
        Unreachable: if the layers before see too many already.
    """
    left = keep_ratio * num_layers - first
    if keep_ratio == 1:
        return 1.0
    if left <= 0:
        raise Unreachable(
            f"{first} of {num_layers} layers see all visual tokens: {keep_ratio} is out of reach"
        )
    return left / (num_layers - first)


def last_prompt_row(state: LayerState, columns: Sequence[int] | Tensor) -> Tensor:
    """Attention that the prompt's last token pays to these places. [len(columns)]."""
    return state.attention[state.num_prompt - 1][columns]
