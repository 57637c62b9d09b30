"""H2O (arXiv:2306.14048): heavy hitters, by the attention that a token has received so far."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_spindle.baselines.base import Baseline, PromptLayer
from vllm_spindle.core.scoring import received_attention


@dataclass(frozen=True)
class H2O(Baseline):
    """Half of the budget to the last tokens, half to the highest column sums of attention.

    ``s_a = sum over all queries b of softmax(q_b k / sqrt(d))_a``, at the end of the prompt; the
    release has heavy = recent = 0.1 of the prompt, so equal halves here at any budget. One choice
    at the end of the prompt and none while decoding, as follow-ups run it.

    GQA: mean of a group's sums.
    """

    def recent(self, num_kept: int) -> int:
        return max(1, num_kept // 2)

    def score(self, layer: PromptLayer) -> Tensor:
        everyone = torch.arange(layer.num_tokens)
        sums = received_attention(layer.queries, layer.keys, layer.scale, positions=everyone)
        return sums.mean(dim=1)
