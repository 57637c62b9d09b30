"""Which kv heads need their tokens: measured on a model's own answers, by taking away.

Everything is kept at first. Again and again the head whose loss of a step moves the model's own
answers least, for the tokens that it frees, gives it up. The way down is one profile for all
ratios. Heads are measured under what the others have left and not one by one, because they stand
in for each other: on models/needle any single layer can go, the first three together cannot.

Shapes: L layers, K kv heads, C context tokens, D head size.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_spindle.baselines.base import PromptLayer, ReducedLayer, take
from vllm_spindle.choice_rule import choice_rule
from vllm_spindle.config import SpindleConfig
from vllm_spindle.core.choice import rank_context
from vllm_spindle.core.observers import first_observed, observed_positions
from vllm_spindle.hf_layers import QueryCache, enable

LINEAR_STEP = 0.25  # of the context, while a head keeps more than half of it
SHRINK = 0.7  # below that, of what it keeps
FLOOR = 0.03  # of the context, which a head keeps in any case
SPACING = 0.05  # of the mean shares that are written down
TRUSTED_BETWEEN = (0.25, 0.5)  # mean shares between which trust rises to all that was measured
LEAST_MEAN = 0.08  # where the way down ends

Shares = list[list[float]]
"""Share of the context that each head keeps, [L][K]."""


@dataclass(frozen=True)
class Question:
    """A prompt to reduce, and what is asked of it.

    Attributes:
        prompt_ids: [P].
        followups: token ids of each question behind the prompt, in turn; ``[[]]`` if there is one
            and it stands in the prompt.
        num_new: most tokens of an answer.
    """

    prompt_ids: Sequence[int]
    followups: Sequence[Sequence[int]]
    num_new: int


@dataclass(frozen=True)
class Asked:
    """A prompt, and what the model says to its questions.

    Attributes:
        layers: the prompt's.
        ranked: each layer's context tokens, the most important first. [L] of [K, C].
        unread: tokens to feed after the reduction: questions and answers. [1, N].
        rereads: whether the first of them is the prompt's last token again.
        rows: which of them are followed by a token of an answer. [n].
        log_probs: the model's own, there. [n, V].
    """

    layers: list[PromptLayer]
    ranked: list[Tensor]
    unread: Tensor
    rereads: bool
    rows: Tensor
    log_probs: Tensor


@torch.inference_mode()
def read(model: Any, config: SpindleConfig, question: Question, stop_ids: set[int]) -> Asked:
    """A prompt and the model's own greedy answers over all of it.

    Args:
        model: one that passed ``hf_layers.enable``.
        config: how tokens are chosen, and how many recent ones are kept.
        question: the prompt, and what is asked.
        stop_ids: tokens that end an answer.
    """
    cache = QueryCache(model.config)
    device = model.device
    prompt = torch.tensor([list(question.prompt_ids)], device=device)
    model(prompt, past_key_values=cache, logits_to_keep=1)
    layers = cache.prompt(None)
    rereads = not question.followups[0]
    if rereads:
        cache.crop(-1)
    unread: list[int] = [question.prompt_ids[-1]] if rereads else []
    rows: list[int] = []
    log_probs: list[Tensor] = []
    fed = 0
    for followup in question.followups:
        unread += followup
        for _ in range(question.num_new):
            ids = torch.tensor([unread[fed:]], device=device)
            fed = len(unread)
            out = model(ids, past_key_values=cache, logits_to_keep=1)
            rows.append(fed - 1)
            log_probs.append(out.logits[0, -1].float().log_softmax(-1))
            unread.append(int(log_probs[-1].argmax()))
            if unread[-1] in stop_ids:
                break
    ranked = [_rank(config, layer) for layer in layers]
    ids = torch.tensor([unread[:fed]], device=device)
    return Asked(layers, ranked, ids, rereads, torch.tensor(rows), torch.stack(log_probs))


def _rank(config: SpindleConfig, layer: PromptLayer) -> Tensor:
    """The context by importance, as the engine ranks it. [K, C]."""
    num_tokens = layer.num_tokens
    first = first_observed(
        num_tokens,
        window=config.window,
        observers=config.num_observers,
        prefix_tokens=0,
        shared_tokens=0,
    )
    observed = observed_positions(
        num_tokens, window=config.window, observers=config.num_observers, first=first
    )
    positions = torch.from_numpy(observed)
    num_context = num_tokens - config.recent
    return rank_context(
        choice_rule(config, seed=config.seed),
        layer.queries[:, :, positions],
        layer.keys,
        positions,
        scale=layer.scale,
        num_context=num_context,
        num_kept=num_context,
    )


@torch.inference_mode()
def divergence(model: Any, asked: Asked, shares: Shares) -> float:
    """KL of the answers' distributions, nats a token, where each head keeps its share."""
    cache = QueryCache(model.config)
    for own, layer, ranked, heads in zip(
        cache.layers, asked.layers, asked.ranked, shares, strict=True
    ):
        own.load(layer)
        own.reduce(_keep(layer, ranked, heads))
    if asked.rereads:
        cache.crop(-1)
    out = model(asked.unread, past_key_values=cache)
    found = out.logits[0, asked.rows].float().log_softmax(-1)
    return float((asked.log_probs.exp() * (asked.log_probs - found)).sum(-1).mean())


def _keep(layer: PromptLayer, ranked: Tensor, heads: Sequence[float]) -> ReducedLayer:
    num_context = ranked.shape[1]
    counts = torch.tensor([round(share * num_context) for share in heads], device=ranked.device)
    best = ranked[:, : int(counts.max())]
    is_there = torch.arange(best.shape[1], device=ranked.device) < counts[:, None]
    return ReducedLayer(
        keys=take(layer.keys, best),
        values=take(layer.values, best),
        is_there=is_there,
        positions=best,
        num_context=num_context,
        num_bytes=0,  # nobody asks
    )


def measure_profile(
    model: Any,
    config: SpindleConfig,
    questions: Sequence[Question],
    *,
    stop_ids: set[int] = frozenset(),  # type: ignore[assignment]
    trust: float = 0.8,
    on_step: Callable[[float, float], None] = lambda mean, loss: None,
) -> dict[float, Shares]:
    """The profile of a model on prompts of the kind that it will be asked.

    Args:
        model: a causal language model of transformers; its attention will pass through ours.
        config: how tokens are chosen.
        questions: what to measure on.
        stop_ids: tokens that end an answer.
        trust: how far to go from all heads alike to what was measured, [0, 1], where a quarter or
            less is kept; see ``_trust_at``.
        on_step: told the mean share and the loss, nats a token, of every step.

    Returns:
        Mean share -> share of each head; see ``core/profile.py: make_profile``.
    """
    enable(model)
    asked = [read(model, config, question, set(stop_ids)) for question in questions]

    def loss(shares: Shares) -> float:
        return sum(divergence(model, each, shares) for each in asked) / len(asked)

    num_layers, num_heads = len(asked[0].layers), asked[0].ranked[0].shape[0]
    path = []
    for shares, found in _way_down([[1.0] * num_heads for _ in range(num_layers)], loss):
        path.append(shares)
        on_step(_mean(shares), found)
    return _thin(path, trust)


def _way_down(start: Shares, loss: Callable[[Shares], float]) -> Iterator[tuple[Shares, float]]:
    """Shares and their loss, step by step, from ``start`` on.

    A step's price only grows while others are taken: the cheapest by old prices is priced again,
    and taken if it is still the cheapest. So a step costs a few measurements, not one a head.
    """
    current, now = start, 0.0
    yield current, now
    prices: list[tuple[float, int, int]] = []  # nats per share freed, layer, head

    def price(layer: int, head: int) -> tuple[float, Shares, float]:
        less = [list(heads) for heads in current]
        less[layer][head] = _less(current[layer][head])
        found = loss(less)
        return (found - now) / (current[layer][head] - less[layer][head]), less, found

    for layer, heads in enumerate(start):
        for head in range(len(heads)):
            heapq.heappush(prices, (price(layer, head)[0], layer, head))
    while prices and _mean(current) > LEAST_MEAN:
        _, layer, head = heapq.heappop(prices)
        asked, less, found = price(layer, head)
        if prices and asked > prices[0][0]:
            heapq.heappush(prices, (asked, layer, head))
            continue
        current, now = less, found
        yield current, now
        if current[layer][head] > FLOOR:
            heapq.heappush(prices, (asked, layer, head))


def _less(share: float) -> float:
    """A step further down."""
    return max(share - LINEAR_STEP if share > 0.5 else share * SHRINK, FLOOR)


def _trust_at(mean: float, least: float) -> float:
    """How far to go from all heads alike to what was measured where they keep ``mean``.

    Down to a half next to nothing is lost (``nats_by_mean_share``), so what was measured holds as
    it is. Further down every step costs, and some dozen prompts say too little to leave a head with
    next to nothing.
    """
    low, high = TRUSTED_BETWEEN
    part = (mean - low) / (high - low)
    return least + (1 - least) * min(1.0, max(0.0, part))


def _thin(path: Sequence[Shares], trust: float) -> dict[float, Shares]:
    """Points at round means, on the lines between the steps of the way down, as far as trusted."""
    points: dict[float, Shares] = {}
    for above, below in zip(path, path[1:], strict=False):
        high, low = _mean(above), _mean(below)
        for point in range(int(high / SPACING), int(low / SPACING), -1):
            mean = round(point * SPACING, 4)
            if low < mean <= high:
                part = (mean - low) / (high - low)
                here = _trust_at(mean, trust)
                points[mean] = [
                    [
                        round(here * (b + part * (a - b)) + (1 - here) * mean, 4)
                        for a, b in zip(up, down, strict=True)
                    ]
                    for up, down in zip(above, below, strict=True)
                ]
    return points


def _mean(shares: Shares) -> float:
    return sum(map(sum, shares)) / (len(shares) * len(shares[0]))
