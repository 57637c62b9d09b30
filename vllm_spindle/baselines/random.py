"""Tokens drawn by lot: any method must beat it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_spindle.baselines.base import Baseline, PromptLayer
from vllm_spindle.core.scoring import random_importance


@dataclass(frozen=True)
class Random(Baseline):
    """Uniform without replacement, each kv head and layer by its own draw.

    Attributes:
        seed: of the draws; the prompt's length enters too.
        num_recent: the window that others keep is kept here as well, so that only the choice of
            context differs.
    """

    seed: int = 0
    num_recent: int = 32

    def score(self, layer: PromptLayer) -> Tensor:
        num_kv_heads, num_tokens = layer.keys.shape[:2]
        seed = (self.seed * 1009 + layer.layer_idx) * 65537 + num_tokens
        device: torch.device = layer.keys.device
        return random_importance(num_kv_heads, 1, num_tokens, seed=seed, device=device)[:, 0]
