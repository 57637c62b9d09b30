"""D2O (arXiv:2406.13035): heavy hitters, and what is evicted merges into its nearest kept token."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_spindle.baselines.base import PromptLayer, share_tokens, take
from vllm_spindle.baselines.h2o import H2O
from vllm_spindle.core.scoring import received_attention


@dataclass(frozen=True)
class D2O(H2O):
    """H2O's scores with the first tokens kept; layers by the spread of their attention; merging.

    Layers: v = variance over tokens of the column sums of attention, those scaled to [0, 1], mean
    over heads; shares go by ``softmax(-v)``, at least 0.01 of the prompt.
    Merging, per kv head: each evicted key has a nearest kept key by cosine u. The mean of all u is
    the threshold; a token at or above it is folded into its nearest, key and value, as a mean
    weighted by u, the kept one at 1. The others are dropped. Only at the end of the prompt, so the
    threshold's moving average of the release does not come in.

    GQA: mean of a group's sums. Nothing is stored beside rows: merging costs no bytes.
    """

    num_sinks: int = 4

    def score(self, layer: PromptLayer) -> Tensor:
        scores = super().score(layer)
        scores[:, : self.num_sinks] = torch.inf
        return scores

    def layer_budgets(self, layers: Sequence[PromptLayer], total: int) -> list[int]:
        spread = torch.stack([_spread(layer) for layer in layers])
        shares = torch.softmax(-spread, dim=0) * total / layers[0].num_tokens
        weights = [Fraction(float(share)) for share in shares.clamp(0.01, 1)]
        return share_tokens(weights, total, layers[0].num_tokens)

    def fold(self, layer: PromptLayer, num_context: int, kept: Tensor) -> tuple[Tensor, Tensor]:
        context, values = layer.keys[:, :num_context].float(), layer.values[:, :num_context].float()
        if kept.shape[1] in (0, num_context):
            return take(layer.keys, kept), take(layer.values, kept)
        unit = F.normalize(context, dim=-1)
        similarity, nearest = (unit @ take(unit, kept).transpose(1, 2)).max(dim=-1)  # [K, C]
        evicted = torch.ones_like(similarity, dtype=torch.bool).scatter(1, kept, False)
        threshold = (similarity * evicted).sum(-1, keepdim=True) / evicted.sum(-1, keepdim=True)
        weights = similarity * (evicted & (similarity >= threshold))
        weight = torch.ones(kept.shape, device=kept.device).scatter_add(1, nearest, weights)
        merged = []
        for tokens, own in ((context, layer.keys), (values, layer.values)):
            target = nearest.unsqueeze(-1).expand_as(tokens)
            sums = take(own, kept).float().scatter_add(1, target, tokens * weights.unsqueeze(-1))
            merged.append((sums / weight.unsqueeze(-1)).to(own.dtype))
        return merged[0], merged[1]


def _spread(layer: PromptLayer) -> Tensor:
    """Variance over tokens of the scaled column sums, mean over heads. []."""
    everyone = torch.arange(layer.num_tokens)
    sums = received_attention(layer.queries, layer.keys, layer.scale, positions=everyone)
    low, high = sums.amin(-1, keepdim=True), sums.amax(-1, keepdim=True)
    scaled = (sums - low) / (high - low).clamp(min=1e-12)
    return scaled.var(dim=-1, correction=0).mean()
