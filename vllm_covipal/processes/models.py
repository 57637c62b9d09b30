"""vLLM's model classes with pruning, and their processors: any process that knows the model."""

from typing import Any

from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_covipal.engine import metrics
from vllm_covipal.engine.families import (
    LlavaFamily,
    LlavaNextFamily,
    LlavaOnevisionFamily,
    QwenVLFamily,
)
from vllm_covipal.engine.model import PruningMixin, PruningMRoPEMixin
from vllm_covipal.engine.processor import pruning_factory
from vllm_covipal.engine.visual_pruner import forget_encoded
from vllm_spindle_patches import encoder_reset, media_positions, worker_stats

media_positions.apply()
worker_stats.apply(metrics.NAME, metrics.worker_stats)
encoder_reset.apply(forget_encoded)


def with_pruning_processor(model_class: Any) -> Any:
    """Register the stock class's processor, pruning, for ours."""
    stock = model_class._processor_factory
    return MULTIMODAL_REGISTRY.register_processor(
        pruning_factory(stock.processor, model_class.family),
        info=stock.info,
        dummy_inputs=stock.dummy_inputs,
    )(model_class)


@with_pruning_processor
class CovipalLlava(PruningMixin, LlavaForConditionalGeneration):
    """LLaVA-1.5."""

    family = LlavaFamily()


@with_pruning_processor
class CovipalLlavaNext(PruningMixin, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""

    family = LlavaNextFamily()


@with_pruning_processor
class CovipalLlavaOnevision(PruningMixin, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision."""

    family = LlavaOnevisionFamily()


@with_pruning_processor
class CovipalQwen2VL(PruningMRoPEMixin, Qwen2VLForConditionalGeneration):
    """Qwen2-VL."""

    family = QwenVLFamily()


@with_pruning_processor
class CovipalQwen2_5_VL(PruningMRoPEMixin, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""

    family = QwenVLFamily()
