"""StreamingLLM (arXiv:2309.17453): the first tokens and the last ones, whatever they say."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_spindle.baselines.base import Baseline, PromptLayer


@dataclass(frozen=True)
class StreamingLLM(Baseline):
    """``num_sinks`` first tokens, the rest of the budget from the end. Alike in all heads.

    Tokens keep their own positions here, as in kvpress; the authors' release numbers them anew
    within the cache, for texts without end. The default of 4 sinks is theirs.
    """

    num_sinks: int = 4

    def score(self, layer: PromptLayer) -> Tensor:
        scores = torch.arange(layer.num_tokens, device=layer.keys.device).float()
        scores[: self.num_sinks] = layer.num_tokens
        return scores.expand(layer.keys.shape[0], -1)
