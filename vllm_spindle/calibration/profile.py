"""How to share the bytes among layers: measured on the answers of a model, by taking away.

Everything is kept at first. Again and again each layer in turn is tried with a bit less, and the
one whose loss moves the model's own answers least gives it up. The way down is one profile for all
ratios. Layers are measured together and not one by one, because they stand in for each other: on
the needle model any single one can go, the first three together cannot.

Shapes: L layers, K kv heads, C context tokens, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_spindle.baselines.base import PromptLayer, ReducedLayer, take
from vllm_spindle.baselines.profiled import Profile, Profiled
from vllm_spindle.hf_layers import QueryCache, enable

LINEAR_STEP = 1 / 6  # of the prompt, while a layer keeps more than half of it
SHRINK = 2 / 3  # below that, of what it keeps
SPACING = 0.05  # of the ratios that are written down


@dataclass(frozen=True)
class Asked:
    """A prompt, and what the model says to a question behind it or at its end.

    Attributes:
        layers: the prompt's.
        ranked: each layer's context tokens, the most important first. [L] of [K, C].
        unread: tokens to feed after the reduction: a question and its answer, the last left out.
        rereads: whether the first of them is the prompt's last token again.
        log_probs: the model's own, at the answer. [N, V].
    """

    layers: list[PromptLayer]
    ranked: list[Tensor]
    unread: Tensor
    rereads: bool
    log_probs: Tensor


@torch.inference_mode()
def read(
    model: Any, method: Profiled, prompt_ids: Sequence[int], followup: Sequence[int], num_new: int
) -> Asked:
    """A prompt and the model's own greedy answer over all of it.

    Args:
        model: one that passed ``hf_layers.enable``.
        method: whose scores and window.
        prompt_ids: [P].
        followup: a question behind the prompt; empty if it is in the prompt.
        num_new: tokens of the answer.
    """
    cache = QueryCache(model.config)
    out = model(torch.tensor([list(prompt_ids)]), past_key_values=cache, logits_to_keep=1)
    layers = cache.prompt(None)
    question = list(followup) or [prompt_ids[-1]]
    if not followup:
        cache.crop(-1)
    out = model(torch.tensor([question]), past_key_values=cache, logits_to_keep=1)
    answer, rows = [], []
    for _ in range(num_new):
        rows.append(out.logits[0, -1].float().log_softmax(-1))
        answer.append(int(rows[-1].argmax()))
        if len(answer) < num_new:
            out = model(torch.tensor([answer[-1:]]), past_key_values=cache)
    num_context = layers[0].num_tokens - method.window
    scores = [method.importance(layer, num_context) for layer in layers]
    ranked = [each.argsort(-1, descending=True) for each in scores]
    unread = torch.tensor([question + answer[:-1]])
    return Asked(layers, ranked, unread, not followup, torch.stack(rows))


@torch.inference_mode()
def divergence(model: Any, asked: Asked, shares: Sequence[float]) -> float:
    """KL of the answer's distributions, nats, where each layer keeps its share of the prompt."""
    cache = QueryCache(model.config)
    for own, layer, ranked, share in zip(
        cache.layers, asked.layers, asked.ranked, shares, strict=True
    ):
        num_context = ranked.shape[1]
        num_kept = round(share * layer.num_tokens) - (layer.num_tokens - num_context)
        kept = ranked[:, : max(0, num_kept)].sort(-1).values
        own.load(layer)
        own.reduce(
            ReducedLayer(
                keys=take(layer.keys, kept),
                values=take(layer.values, kept),
                is_there=torch.ones_like(kept, dtype=torch.bool),
                positions=kept,
                num_context=num_context,
                num_bytes=0,  # nobody asks
            )
        )
    if asked.rereads:
        cache.crop(-1)
    num_rows = len(asked.log_probs)
    out = model(asked.unread, past_key_values=cache, logits_to_keep=num_rows)
    found = out.logits[0].float().log_softmax(-1)
    return float((asked.log_probs.exp() * (asked.log_probs - found)).sum(-1).mean())


def measure_profile(
    model: Any,
    method: Profiled,
    prompts: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    num_new: int = 8,
    least_ratio: float = 0.1,
    trust: float = 0.5,
    bands: Sequence[range] | None = None,
) -> Profile:
    """The profile of a model on prompts of the kind that it will be asked.

    Args:
        model: a causal language model of transformers; its attention will pass through ours.
        method: whose scores and window.
        prompts: token ids of a prompt, and of a question behind it, empty if it is in the prompt.
        num_new: tokens of each answer.
        least_ratio: where to stop.
        trust: how far to go from all layers alike to what was measured, [0, 1]. Half-way: a dozen
            prompts say too little to leave a layer with its window alone.
        bands: layers that go together; each for itself by default.
    """
    enable(model)
    asked = [read(model, method, *prompt, num_new) for prompt in prompts]
    num_layers = len(asked[0].layers)
    bands = bands or [range(i, i + 1) for i in range(num_layers)]
    # A layer keeps its window whatever happens.
    floor = max(method.window / each.layers[0].num_tokens for each in asked)
    path = [[1.0] * num_layers]
    while _mean(path[-1]) > least_ratio:
        candidates = [less for band in bands if (less := _less(path[-1], band, floor)) != path[-1]]
        if not candidates:
            break
        path.append(
            min(candidates, key=lambda less: sum(divergence(model, each, less) for each in asked))
        )
    return _thin(path, trust)


def _less(shares: Sequence[float], band: range, floor: float) -> list[float]:
    """One band a step further down."""
    less = list(shares)
    for i in band:
        step = shares[i] - LINEAR_STEP if shares[i] > 0.5 else shares[i] * SHRINK
        less[i] = max(step, floor)
    return less


def _thin(path: Sequence[Sequence[float]], trust: float) -> Profile:
    """Points at round ratios, on the lines between the steps of the way down, ``trust`` of them."""
    profile: dict[float, tuple[float, ...]] = {}
    for above, below in zip(path, path[1:], strict=False):
        high, low = _mean(above), _mean(below)
        first, last = round(high / SPACING), round(low / SPACING)
        for point in range(first, last - 1, -1):
            ratio = round(point * SPACING, 4)
            if low <= ratio <= high:
                part = (ratio - low) / (high - low)
                pairs = zip(below, above, strict=True)
                found = (b + part * (a - b) for b, a in pairs)
                profile[ratio] = tuple(round(trust * f + (1 - trust) * ratio, 4) for f in found)
    return profile


def _mean(shares: Sequence[float]) -> float:
    return sum(shares) / len(shares)
