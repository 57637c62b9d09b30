"""Expected Attention (arXiv:2510.00636): attention from queries that are still to come."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_spindle.baselines.base import NUM_FUTURE, Baseline, PromptLayer
from vllm_spindle.core.rotary import unrotate_keys


@dataclass(frozen=True)
class ExpectedAttention(Baseline):
    """The prompt's own queries, as a Gaussian moved to the next positions, times the value's norm.

    Mean m and covariance S of a head's un-rotated queries, the first ``num_sinks`` left out; R, the
    mean rotation of the next ``num_future`` positions, turns them: ``m <- R m``, ``S <- R S R^T``.
    Then ``z_a = k_a m / sqrt(d) + k_a S k_a / (2 d)``, a softmax over tokens, times ``|v_a|``. The
    sinks have the highest score. No window: the last token alone is kept for what comes next.
    Defaults are the authors', in kvpress.

    GQA: mean over the group, after the softmax.

    Attributes:
        num_future: at most ``NUM_FUTURE``.
    """

    num_future: int = NUM_FUTURE
    num_sinks: int = 4

    def score(self, layer: PromptLayer) -> Tensor:
        if layer.cos_sin is None:
            raise ValueError("expected attention: the queries are not turned by a plain rotation")
        num_tokens, scale = layer.num_tokens, layer.scale
        positions = torch.arange(num_tokens, device=layer.keys.device)
        queries = unrotate_keys(layer.queries, positions, layer.cos_sin)
        queries = queries[:, :, min(self.num_sinks, num_tokens - 1) :]
        mean = queries.mean(dim=2, keepdim=True)
        centred = queries - mean
        covariance = centred.transpose(-1, -2) @ centred / queries.shape[2]  # [K, G, D, D]
        turn = _mean_rotation(layer.cos_sin[num_tokens : num_tokens + self.num_future])
        mean = mean @ turn.T
        covariance = turn @ covariance @ turn.T
        keys = layer.keys.float().unsqueeze(1)  # [K, 1, T, D]
        logits = (keys * mean).sum(-1) * scale
        logits = logits + ((keys @ covariance) * keys).sum(-1) * scale**2 / 2
        expected = torch.softmax(logits, dim=-1).mean(dim=1)
        scores = expected * layer.values.float().norm(dim=-1)
        scores[:, : self.num_sinks] = torch.inf
        return scores


def _mean_rotation(cos_sin: Tensor) -> Tensor:
    """Mean of the rotation matrices of these positions: element i with i + D/2. [D, D], float32."""
    cos, sin = cos_sin.float().mean(dim=0).chunk(2)
    return torch.cat(
        [
            torch.cat([torch.diag(cos), -torch.diag(sin)], dim=1),
            torch.cat([torch.diag(sin), torch.diag(cos)], dim=1),
        ]
    )
