"""What covipal cannot serve, found at start-up: option, value, reason, way out."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PixtralVisionConfig
from vllm import envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_covipal.config import KEEP_RATIO_KEY
from vllm_covipal.engine.registration import CLASS_OF


@dataclass(frozen=True)
class Refusal:
    """One reason not to start."""

    option: str
    value: Any
    reason: str
    way_out: str = "serve this model without covipal"

    def __str__(self) -> str:
        return f"covipal does not support {self.option}={self.value}: {self.reason}; {self.way_out}"


def raise_if_any(refusals: list[Refusal]) -> None:
    """Stop start-up with every reason there is.

    Raises:
        ValueError: if the list is not empty.
    """
    if refusals:
        raise ValueError("\n".join(map(str, refusals)))


def config_refusals(vllm_config: VllmConfig) -> list[Refusal]:
    """Everything in the configuration that stands against switching on."""
    return [
        *_platform(vllm_config),
        *_front_process(),
        *_model(vllm_config),
        *_encoder(vllm_config),
        *_parallel(vllm_config),
    ]


def misplaced_options(vllm_config: VllmConfig) -> Iterator[Refusal]:
    """Options of one request where the server's are, with covipal on or off."""
    multimodal = vllm_config.model_config and vllm_config.model_config.multimodal_config
    arguments = (multimodal and multimodal.mm_processor_kwargs) or {}
    if KEEP_RATIO_KEY in arguments:
        yield Refusal(
            "--mm-processor-kwargs", dict(arguments), f"{KEEP_RATIO_KEY} is read off one request, "
            "and here it would be ignored",
            "give every request's in --additional-config, as {'covipal': {'keep_ratio': ...}}",
        )  # fmt: skip


def _platform(vllm_config: VllmConfig) -> Iterator[Refusal]:
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        yield Refusal(
            "platform", current_platform.device_name, "it serves vLLM's CPU and CUDA platforms"
        )


def _front_process() -> Iterator[Refusal]:
    if envs.VLLM_USE_RUST_FRONTEND:
        yield Refusal(
            "VLLM_USE_RUST_FRONTEND", True, "images are counted where requests are read, and that "
            "process loads no plugin, so that it would hand them on unpruned",
            "unset it",
        )  # fmt: skip


def _model(vllm_config: VllmConfig) -> Iterator[Refusal]:
    model = vllm_config.model_config
    if model.architecture not in CLASS_OF:
        yield Refusal(
            "model", model.architecture, f"supported architectures: {', '.join(CLASS_OF)}"
        )
    elif isinstance(model.hf_config.vision_config, PixtralVisionConfig):
        yield Refusal(
            "model", "Pixtral vision tower", "its row breaks are text tokens between the patches"
        )
    if model.runner_type != "generate":
        yield Refusal("runner", model.runner_type, "pruning is for generation")
    if model.skip_tokenizer_init:
        yield Refusal(
            "skip_tokenizer_init", True, "the text context is read off the prompt's tokens",
            "start with a tokenizer",
        )  # fmt: skip


def _encoder(vllm_config: VllmConfig) -> Iterator[Refusal]:
    multimodal = vllm_config.model_config.multimodal_config
    if vllm_config.compilation_config.cudagraph_mm_encoder:
        yield Refusal(
            "cudagraph_mm_encoder", True, "a captured encoder does not run the choice of rows",
            "leave encoder CUDA graphs off",
        )  # fmt: skip
    lora = vllm_config.lora_config
    if lora is not None and lora.enable_tower_connector_lora:
        yield Refusal(
            "enable_tower_connector_lora", True, "adapters of the vision tower change the "
            "embeddings that are kept for the next question on an image",
            "use LoRA on the language model only",
        )  # fmt: skip
    if multimodal is not None and multimodal.is_multimodal_pruning_enabled():
        yield Refusal(
            "video_pruning_rate", multimodal.video_pruning_rate, "vLLM would prune videos as well",
            "set one of the two; covipal prunes videos too",
        )  # fmt: skip
    if vllm_config.ec_transfer_config is not None:
        yield Refusal(
            "ec_transfer_config", "set", "another instance would encode, and not prune",
            "encode and decode in one instance",
        )  # fmt: skip
    if vllm_config.speculative_config is not None:
        yield Refusal(
            "speculative_config", "set", "a draft model would see the unpruned prompt",
            "serve without speculative decoding",
        )  # fmt: skip


def _parallel(vllm_config: VllmConfig) -> Iterator[Refusal]:
    num_stages = vllm_config.parallel_config.pipeline_parallel_size
    if num_stages > 1:
        yield Refusal(
            "--pipeline-parallel-size", num_stages, "only the first rank encodes and chooses, so "
            "later ones do not learn the positions of kept tokens nor report what was pruned",
            "leave --pipeline-parallel-size at 1",
        )  # fmt: skip
