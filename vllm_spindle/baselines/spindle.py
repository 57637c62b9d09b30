"""SpindleKV as the engine serves it: the same plan in blocks, the same choice, the same codebooks.

Method: arXiv:2507.06517, with what differs from it in ``core/``; the paper's own route is
``paper.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from typing_extensions import Self

from vllm_spindle.baselines.base import Method, PromptLayer, ReducedLayer, keep_all
from vllm_spindle.config import SpindleConfig, load_config, with_profile
from vllm_spindle.core.budget import BandPlan
from vllm_spindle.core.codebook_bytes import dense_bytes
from vllm_spindle.policy import SpindlePolicy

DEFAULT_BLOCK_SIZE = 16  # vLLM's on CUDA


@dataclass(frozen=True)
class Spindle(Method):
    """The engine's plan and choice.

    Attributes:
        config: the dials; ``keep_ratio`` is overridden by ``byte_ratio``.
        block_size: tokens per block; bytes are whole blocks, padding included.
    """

    config: SpindleConfig
    block_size: int = DEFAULT_BLOCK_SIZE

    @classmethod
    def of(cls, *, block_size: int = DEFAULT_BLOCK_SIZE, **dials: Any) -> Self:
        """With these dials of ``SpindleConfig``, the others at their defaults."""
        return cls(load_config(dials), block_size)

    def of_model(self, model: str) -> Self:
        """For a model: with the profile beside it, if budgets are measured."""
        return replace(self, config=with_profile(self.config, model))

    @property
    def reads_ahead(self) -> int:
        return self.config.reduce_after

    def reduce(self, layers: Sequence[PromptLayer], byte_ratio: float) -> list[ReducedLayer]:
        policy = make_policy(self.config, self.block_size, len(layers), layers[0].queries)
        plans = policy.plan(layers[0].num_tokens, byte_ratio)
        bands = [policy.band_of_layer(layer.layer_idx) for layer in layers]
        return [
            reduce_by_plan(policy, band, plans[band], layer)
            for band, layer in zip(bands, layers, strict=True)
        ]


def make_policy(
    config: SpindleConfig, block_size: int, num_layers: int, queries: Tensor
) -> SpindlePolicy:
    """The engine's policy for a model. queries: any layer's, [K, G, ...]."""
    return SpindlePolicy(config, num_layers, block_size, num_queries_per_kv=queries.shape[1])


def reduce_by_plan(
    policy: SpindlePolicy, band: int, plan: BandPlan, layer: PromptLayer
) -> ReducedLayer:
    """One layer of an ended prompt as the engine reduces it."""
    if not plan.is_reduced:
        return keep_all(layer)
    # Here: it compiles kernels, which eviction does without.
    from vllm_spindle.calibration.reduce import reduce_prompt

    # As ``engine/reduction.py``: not the same random positions in every layer and prompt.
    seed = (policy.config.seed * 1009 + layer.layer_idx) * 65537 + layer.num_tokens
    reduced = reduce_prompt(policy, policy.method_of_band(band), plan, layer, seed)
    keys, values, is_there = reduced.context
    num_rows = plan.held_blocks * policy.block_size * layer.keys.shape[0]
    return ReducedLayer(
        keys=keys,
        values=values,
        is_there=is_there,
        positions=reduced.positions,
        num_context=reduced.num_context,
        num_bytes=dense_bytes(num_rows, layer.keys.shape[2]),
    )
