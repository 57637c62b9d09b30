"""SnapKV (arXiv:2404.14469): what the last queries look at, smoothed over neighbours."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_spindle.baselines.base import Baseline, PromptLayer
from vllm_spindle.core.scoring import window_attention

PoolName = Literal["avg", "max"]


@dataclass(frozen=True)
class SnapKV(Baseline):
    """Attention of a window of last queries, summed, pooled; the window itself is kept.

    ``s_a = sum over the window's queries b of softmax(q_b k / sqrt(d))_a``, then a pool of stride 1
    over the context, then the top tokens. Defaults of the authors' release: window 32, an average
    over 5; follow-ups run it with a maximum over 7.

    GQA: query heads of a group decide by the mean of their pooled scores, one choice per kv head.
    The release makes copies per query head instead, which true bytes would charge for.

    Attributes:
        num_recent: the window.
        pool_kernel: neighbours, odd; 1 for none.
    """

    num_recent: int = 32
    pool_kernel: int = 5
    pool: PoolName = "avg"

    def score(self, layer: PromptLayer) -> Tensor:
        return self.pooled(layer).mean(dim=1)

    def pooled(self, layer: PromptLayer) -> Tensor:
        """Per query head. [K, G, T], float32; 0 in the window."""
        window = min(self.num_recent, layer.num_tokens)
        attention = window_attention(layer.queries[:, :, -window:], layer.keys, layer.scale)
        num_context = layer.num_tokens - window
        scores = torch.zeros_like(attention)
        scores[..., :num_context] = smooth(
            attention[..., :num_context], self.pool, self.pool_kernel
        )
        return scores


def smooth(scores: Tensor, pool: PoolName, kernel: int) -> Tensor:
    """Average (beyond the ends counts as 0) or maximum over ``kernel`` neighbours. [K, G, T]."""
    if scores.shape[-1] == 0:
        return scores
    half = kernel // 2
    if pool == "max":
        return F.max_pool1d(scores, kernel, stride=1, padding=half)
    return F.avg_pool1d(scores, kernel, stride=1, padding=half)
