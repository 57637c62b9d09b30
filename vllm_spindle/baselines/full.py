"""The whole cache: what every method is measured against."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_spindle.baselines.base import Method, PromptLayer, ReducedLayer, keep_all


@dataclass(frozen=True)
class Full(Method):
    """Keeps everything, whatever ``byte_ratio`` says."""

    def reduce(self, layers: Sequence[PromptLayer], byte_ratio: float) -> list[ReducedLayer]:
        return [keep_all(layer) for layer in layers]
