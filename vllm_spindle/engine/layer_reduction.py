"""One prompt that has ended, in one layer: all that a region is filled from.

Shapes: K kv heads, G query heads per kv head, Q observed queries, R blocks of a region, C context
tokens, D head size.
"""

from dataclasses import dataclass

from torch import Tensor

from vllm_spindle.core.budget import BandPlan
from vllm_spindle.core.choice import ChoiceRule, Maps, attention_maps
from vllm_spindle.core.modality import VisualCap
from vllm_spindle.engine.prompt_tokens import PromptTokens, ReducedLayer


@dataclass(frozen=True)
class LayerReduction:
    """What to reduce, to what.

    Attributes:
        layer: where.
        plan: of its band, which reduces the prompt.
        region: block ids of the reduced region, on the cache's device. [R], int64.
        queries: rotated queries of the observed tokens, and of those of the answer that were waited
            for. [K, G, Q, D].
        positions: of those, on the CPU, or where kernels score on their device. [Q], int64.
        tokens: the prompt's keys and values.
        rule: how the layer chooses.
        num_ahead: last of the queries, which are the answer's.
        visual: which tokens are visual and how many may stay; None for no difference.
    """

    layer: ReducedLayer
    plan: BandPlan
    region: Tensor
    queries: Tensor
    positions: Tensor
    tokens: PromptTokens
    rule: ChoiceRule
    num_ahead: int = 0
    visual: VisualCap | None = None

    @property
    def context(self) -> range:
        """Positions that may be evicted or merged."""
        block_size = self.layer.kv_cache.shape[2]
        return range(self.plan.prefix_blocks * block_size, self.plan.tail_block * block_size)

    def maps(self) -> Maps:
        """What the rule asks about the tokens before the context's end. [K, G, C] each."""
        return attention_maps(
            self.rule,
            self.queries,
            self.tokens.keys,
            self.positions,
            scale=self.layer.scale,
            num_context=self.context.stop,
            num_ahead=self.num_ahead,
        )
