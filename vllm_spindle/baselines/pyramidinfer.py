"""PyramidInfer (arXiv:2405.12532): fewer tokens layer by layer, out of the layer above's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from vllm_spindle.baselines.base import Baseline, PromptLayer, ReducedLayer, share_tokens
from vllm_spindle.core.scoring import received_attention

NUM_HALVINGS = 40  # of the search for the floor


@dataclass(frozen=True)
class PyramidInfer(Baseline):
    """One choice for all heads of a layer, among the tokens that the layer above it kept.

    Scores: attention of the last ``1 + recent_ratio * l`` queries, weighted from 1.0 to 1.2 towards
    the newest, mean over queries and heads; the first 4 tokens are kept. Layer i keeps
    ``(1 - p)(cos(pi i / m) + 1) / 2 + p`` of what the one above kept, so the shares multiply. The
    release has p = 0.9; here p is what makes all layers together fill the budget, and where p = 0
    still leaves more, all shares are scaled down.

    Differs from the release: there those queries' tokens are all kept, a fifth of the prompt; here
    at most half of a layer's budget. And the release drops tokens from the computation of deeper
    layers too; here from the cache alone, which is kinder to the answer.

    GQA: mean over all query heads, one choice for the layer.
    """

    recent_ratio: float = 0.2
    num_sinks: int = 4
    newest_weight: float = 1.2

    def recent(self, num_kept: int) -> int:
        return max(1, num_kept // 2)

    def score(self, layer: PromptLayer) -> Tensor:
        num_rows = min(layer.num_tokens, 1 + int(self.recent_ratio * layer.num_tokens))
        weights = torch.linspace(1.0, self.newest_weight, num_rows, device=layer.keys.device)
        received = received_attention(
            layer.queries[:, :, -num_rows:],
            layer.keys,
            layer.scale,
            positions=torch.arange(layer.num_tokens - num_rows, layer.num_tokens),
            weights=weights / weights.sum(),
        )
        mean = received.mean(dim=(0, 1))
        mean[: self.num_sinks] = torch.inf
        return mean.expand(layer.keys.shape[0], -1)

    def layer_budgets(self, layers: Sequence[PromptLayer], total: int) -> list[int]:
        num_layers, num_tokens = len(layers), layers[0].num_tokens
        low, high = 0.0, 1.0
        for _ in range(NUM_HALVINGS):
            floor = (low + high) / 2
            if sum(_shares(floor, num_layers)) * num_tokens < total:
                low = floor
            else:
                high = floor
        weights = [Fraction(share) for share in _shares(high, num_layers)]
        return share_tokens(weights, total, num_tokens)

    def reduce_to(
        self, layers: Sequence[PromptLayer], budgets: Sequence[int]
    ) -> list[ReducedLayer]:
        alive = torch.ones(layers[0].num_tokens, dtype=torch.bool, device=layers[0].keys.device)
        reduced = []
        for layer, budget in zip(layers, budgets, strict=True):
            scores = self.score(layer).masked_fill(~alive, -torch.inf)
            reduced.append(self.choose(layer, scores, budget))
            alive = torch.zeros_like(alive)
            alive[reduced[-1].positions[0]] = True
            alive[reduced[-1].num_context :] = True
        return reduced


def _shares(floor: float, num_layers: int) -> list[float]:
    """Share of the prompt that each layer keeps."""
    shares, share = [], 1.0
    for i in range(num_layers):
        share *= (1 - floor) * (math.cos(math.pi * i / num_layers) + 1) / 2 + floor
        shares.append(share)
    return shares
