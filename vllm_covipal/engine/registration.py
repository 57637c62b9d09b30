"""Our model classes in vLLM's registry, under names of their own: stock names stay stock."""

from vllm.model_executor.models import ModelRegistry

# vLLM's architecture -> our class in vllm_covipal.processes.models.
CLASS_OF = {
    "LlavaForConditionalGeneration": "CovipalLlava",
    "LlavaNextForConditionalGeneration": "CovipalLlavaNext",
    "LlavaOnevisionForConditionalGeneration": "CovipalLlavaOnevision",
    "Qwen2VLForConditionalGeneration": "CovipalQwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "CovipalQwen2_5_VL",
}


def register_models() -> None:
    """Make our classes known, unimported; safe to call again."""
    for name in CLASS_OF.values():
        ModelRegistry.register_model(name, f"vllm_covipal.processes.models:{name}")
