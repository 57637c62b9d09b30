"""A better default, proposed: what any query looked at from afar, in budgets that were measured.

Four parts, each of which can be taken out alone:

- ``score``: the most attention that a token received from ``min_distance`` or more tokens later,
  from all of the prompt's queries, the window's among them (``core/scoring.received_attention``).
  So tokens are kept for questions that nobody has asked yet. ``repeated`` asks the same of the
  prompt's queries when it is read a second time behind itself, which costs a second prefill.
- ``window_turns``: for a question that the prompt does end with, the last queries' attention has
  its own turn: tokens are taken by one score and by the other alternately, half the budget each.
  ``score`` ``window`` is that alone, as SnapKV chooses.
- ``pool_kernel``: the maximum over neighbours. Without it the later tokens of an answer are lost.
- ``profile``: how the bytes are shared among layers, found by ``calibration/profile.py`` on prompts
  of the kind that will be asked. None for all layers alike.

An engine can serve all of it: maxima of chunks have their maximum, a layer's share is known before
the data, and the budget is whole blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from vllm_spindle.baselines.base import (
    Method,
    PromptLayer,
    ReducedLayer,
    fill,
    keep_all,
    take,
    total_tokens,
)
from vllm_spindle.core.budget import num_blocks, share_out
from vllm_spindle.core.codebook_bytes import dense_bytes
from vllm_spindle.core.eviction import rank_union
from vllm_spindle.core.scoring import (
    pooled_importance,
    random_importance,
    received_attention,
    window_attention,
)

ScoreName = Literal["received", "repeated", "window", "random"]
Profile = Mapping[float, Sequence[float]]
"""Share of the bytes over all layers -> share of its prompt that each layer keeps, [L]."""


@dataclass(frozen=True)
class Profiled(Method):
    """See the module. Defaults are the proposal's.

    Attributes:
        profile: measured; shares between two of its points are on the line between them.
        score: ``received`` or ``repeated``; ``window`` or ``random`` for ablation.
        window_turns: see the module.
        pool_kernel: neighbours, odd; 1 for none.
        min_distance: tokens; attention over less does not count.
        stride: every so many of the prompt's queries score, and the window's.
        gqa: how query heads of a group decide: the highest score of any (``max``), their mean, or
            in turns (``union``).
        window: last tokens, always kept, rounded up to whole blocks.
        block_size: tokens per block; bytes are whole blocks, padding included.
    """

    profile: Profile | None = None
    score: ScoreName = "received"
    window_turns: bool = True
    pool_kernel: int = 5
    min_distance: int = 16
    stride: int = 1
    gqa: Literal["max", "mean", "union"] = "max"
    window: int = 32
    block_size: int = 16

    @property
    def reads_twice(self) -> bool:  # type: ignore[override]
        return self.score == "repeated"

    def reduce(self, layers: Sequence[PromptLayer], byte_ratio: float) -> list[ReducedLayer]:
        total_tokens(layers, byte_ratio)  # refuses what cannot be
        num_tokens = layers[0].num_tokens
        tail_block = max(0, num_tokens - self.window) // self.block_size
        if byte_ratio >= 1 or tail_block == 0:
            return [keep_all(layer) for layer in layers]
        tail_blocks = num_blocks(num_tokens, self.block_size) - tail_block
        total = int(Fraction(str(byte_ratio)) * num_tokens * len(layers) / self.block_size)
        total = min(max(0, total - tail_blocks * len(layers)), tail_block * len(layers))
        blocks = num_tokens / self.block_size
        wanted = [
            max(Fraction(0), Fraction(share * blocks) - tail_blocks)
            for share in self._shares(len(layers), byte_ratio)
        ]
        quotas = fill(wanted, total, tail_block)
        floor = 1 if total >= len(layers) else 0
        shares = share_out(quotas, total, floor=floor, cap=tail_block)
        return [
            self._reduce_layer(layer, tail_block, share)
            for layer, share in zip(layers, shares, strict=True)
        ]

    def importance(self, layer: PromptLayer, num_context: int) -> Tensor:
        """Of the context, per kv head. [K, C], float32."""
        first = self._joined(self.scores(layer, num_context, self.score))
        if not self.window_turns or self.score == "window":
            return first
        return _by_turns(
            torch.stack([first, self._joined(self.scores(layer, num_context, "window"))], dim=1)
        )

    def scores(self, layer: PromptLayer, num_context: int, score: ScoreName) -> Tensor:
        """Pooled, per query head. [K, G, C], float32."""
        if score == "random":
            return random_importance(
                *layer.queries.shape[:2], num_context, seed=layer.layer_idx, device="cpu"
            ).to(layer.keys.device)
        first = layer.num_tokens - min(self.window, layer.num_tokens)
        if score == "window":
            attention = window_attention(layer.queries[:, :, first:], layer.keys, layer.scale)
        elif score == "repeated":
            if layer.repeated is None:
                raise ValueError("score 'repeated': the prompt was read once only")
            attention = received_attention(
                layer.repeated,
                layer.keys,
                layer.scale,
                positions=layer.num_tokens + torch.arange(layer.num_tokens),
                reduction="max",
            )
        else:
            attention = torch.maximum(self._received(layer, 0, first), self._received(layer, first))
        return pooled_importance(attention, num_context, pool_kernel=self.pool_kernel)

    def _joined(self, scores: Tensor) -> Tensor:
        """By the group's rule. [K, C]."""
        if self.gqa == "union":
            return _by_turns(scores)
        return scores.mean(dim=1) if self.gqa == "mean" else scores.amax(dim=1)

    def _received(self, layer: PromptLayer, first: int, stop: int | None = None) -> Tensor:
        """From queries ``[first, stop)``, in strides; from all of them without ``stop``."""
        stride = 1 if stop is None else self.stride
        return received_attention(
            layer.queries[:, :, first:stop:stride],
            layer.keys,
            layer.scale,
            positions=torch.arange(first, stop or layer.num_tokens, stride),
            min_distance=self.min_distance,
            reduction="max",
        )

    def _shares(self, num_layers: int, byte_ratio: float) -> list[float]:
        if self.profile is None:
            return [byte_ratio] * num_layers
        return interpolate(self.profile, num_layers, byte_ratio)

    def _reduce_layer(self, layer: PromptLayer, tail_block: int, share: int) -> ReducedLayer:
        if share == tail_block:
            return keep_all(layer)
        num_context, num_kept = tail_block * self.block_size, share * self.block_size
        kept = (
            self.importance(layer, num_context).topk(num_kept, dim=-1).indices.sort(dim=-1).values
        )
        held = num_blocks(layer.num_tokens, self.block_size) - tail_block + share
        return ReducedLayer(
            keys=take(layer.keys, kept),
            values=take(layer.values, kept),
            is_there=torch.ones_like(kept, dtype=torch.bool),
            positions=kept,
            num_context=num_context,
            num_bytes=dense_bytes(
                layer.keys.shape[0] * held * self.block_size, layer.keys.shape[2]
            ),
        )


def _by_turns(scores: Tensor) -> Tensor:
    """Scores in the order in which several take turns to choose. [K, several, C] -> [K, C]."""
    num_context = scores.shape[-1]
    ranked = rank_union(scores, num_context)
    places = torch.arange(num_context, 0, -1, device=ranked.device).float()
    return torch.empty_like(scores[:, 0]).scatter(1, ranked, places.expand_as(ranked))


def interpolate(profile: Profile, num_layers: int, byte_ratio: float) -> list[float]:
    """Share of the prompt per layer, on the line between the two nearest points.

    Beyond the points: towards everything above, in proportion below.

    Raises:
        ValueError: if a point has another number of layers.
    """
    points: dict[float, list[float]] = {
        float(ratio): [float(share) for share in shares] for ratio, shares in profile.items()
    }
    points |= {0.0: [0.0] * num_layers, 1.0: [1.0] * num_layers}
    if any(len(shares) != num_layers for shares in points.values()):
        raise ValueError(f"profile: every point needs a share for each of {num_layers} layers")
    low = max(ratio for ratio in points if ratio <= byte_ratio)
    high = min(ratio for ratio in points if ratio >= byte_ratio)
    part = (byte_ratio - low) / (high - low) if high > low else 0.0
    return [
        below + part * (above - below)
        for below, above in zip(points[low], points[high], strict=True)
    ]


def profile_of(value: Any) -> Profile:
    """A profile as JSON has it, ratios as text."""
    return {float(ratio): tuple(shares) for ratio, shares in value.items()}
