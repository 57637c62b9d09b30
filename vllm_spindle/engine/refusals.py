"""What spindle cannot serve, found at start-up: option, value, reason, way out.

Two moments: the configuration in the front process (``config_refusals``; also what
``vllm-spindle doctor`` prints), and in the worker each attention layer (``layer_refusals``) and
vLLM's groups of them (``group_refusals``), for what only the model's own code reveals.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm import envs
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.torch_utils import is_quantized_kv_cache

from vllm_spindle.config import SpindleConfig
from vllm_spindle.core.bands import default_num_bands
from vllm_spindle.engine.platforms import CUDA, target
from vllm_spindle.policy import SpindlePolicy

WITHOUT = "or serve without spindle"


@dataclass(frozen=True)
class Refusal:
    """One reason not to start."""

    option: str
    value: Any
    reason: str
    way_out: str = "serve this model without spindle"

    def __str__(self) -> str:
        return f"spindle does not support {self.option}={self.value}: {self.reason}; {self.way_out}"


def raise_if_any(refusals: list[Refusal]) -> None:
    """Stop start-up with every reason there is.

    Raises:
        ValueError: if the list is not empty.
    """
    if refusals:
        raise ValueError("\n".join(str(refusal) for refusal in dict.fromkeys(refusals)))


def config_refusals(vllm_config: VllmConfig, config: SpindleConfig) -> list[Refusal]:
    """Everything in the configuration that stands against switching on."""
    found = [
        *_platform(),
        *_cuda(vllm_config, config),
        *_front_end(),
        *_model(vllm_config),
        *_parallel(vllm_config),
        *_cache(vllm_config),
        *_scheduling(vllm_config),
        *_bands(vllm_config, config),
        *_codebooks(vllm_config, config),
        *_prefix(vllm_config, config),
        *_profile(vllm_config, config),
    ]
    return found


def layer_refusals(layer: Any) -> list[Refusal]:
    """What an attention layer's own settings rule out."""
    impl, name = layer.impl, layer.layer_name
    found = []
    if getattr(impl, "alibi_slopes", None) is not None:
        found.append(Refusal("model", "ALiBi", f"{name} biases attention by distance"))
    if getattr(impl, "logits_soft_cap", None):
        found.append(Refusal("model", "logit soft-cap", f"{name} caps attention logits"))
    if getattr(impl, "sinks", None) is not None:
        found.append(Refusal("model", "attention sinks", f"{name} has learned sinks"))
    if layer.sliding_window is not None:
        found.append(Refusal("model", "sliding window", f"{name} attends to a window already"))
    if layer.head_size_v != layer.head_size:
        found.append(Refusal("model", "head sizes", f"{name}: keys and values differ in width"))
    return found


def group_refusals(groups: Sequence[Any], policy: SpindlePolicy) -> list[Refusal]:
    """What vLLM's KV-cache groups rule out: each must be all layers of a band, in their order.

    Args:
        groups: vLLM's, shallow band to deep.
        policy: the plan, whose bands and blocks they must have.
    """
    found = []
    layers = [tuple(map(extract_layer_index, group.layer_names)) for group in groups]
    if layers != [tuple(band) for band in policy.bands]:
        reason = "its layers do not have one attention each, and so vLLM's groups are not bands"
        found.append(Refusal("model", f"layers {layers}", reason))
    sizes = {group.kv_cache_spec.block_size for group in groups}
    if sizes != {policy.block_size}:
        reason = "its layers' caches differ in size, and with them the tokens of a block"
        found.append(Refusal("model", f"blocks of {sorted(sizes)} tokens", reason))
    return found


def backend_refusals(name: str) -> list[Refusal]:
    """What is wrong with an attention backend, vLLM's choice or the user's."""
    platform = target()
    if platform is None or name in platform.backends:
        return []
    ours = " or ".join(platform.backends)
    reason = f"spindle's attention is derived from {ours}"
    way_out = f"use --attention-backend {ours}, {WITHOUT}"
    return [Refusal("--attention-backend", name, reason, way_out)]


def _platform() -> Iterator[Refusal]:
    if target() is None:
        yield Refusal(
            "platform",
            current_platform.device_name,
            "it serves vLLM's CPU and CUDA platforms",
            "use one of them, " + WITHOUT,
        )


def _cuda(vllm_config: VllmConfig, config: SpindleConfig) -> Iterator[Refusal]:
    if target() is not CUDA:
        return
    if not vllm_config.use_v2_model_runner:
        yield Refusal(
            "VLLM_USE_V2_MODEL_RUNNER",
            0,
            "on CUDA it serves model runner V2, vLLM's default there",
            "remove it, or what makes vLLM choose V1",
        )
    if config.gqa == "unfold":
        yield Refusal(
            "gqa",
            "unfold",
            "the reference runs one kernel per query head, on the CPU alone",
            "use union or mean",
        )
    backend = vllm_config.attention_config.backend
    if backend is not None:
        yield from backend_refusals(backend.name)


def _front_end() -> Iterator[Refusal]:
    if envs.VLLM_USE_RUST_FRONTEND:
        yield Refusal(
            "VLLM_USE_RUST_FRONTEND",
            1,
            "it asks no plugin whether a request's options are valid, and a bad one would end the "
            "engine",
            "remove it, " + WITHOUT,
        )


def _model(vllm_config: VllmConfig) -> Iterator[Refusal]:
    model = vllm_config.model_config
    text = model.hf_text_config
    if model.runner_type != "generate":
        yield Refusal("runner", model.runner_type, "only generation has a decode to speed up")
    if vllm_config.is_mm_encoder_only:
        yield Refusal("--mm-encoder-only", True, "an encoder instance has no KV cache to reduce")
    if model.is_diffusion:
        yield Refusal("model", model.model, "diffusion models compute tokens more than once")
    if model.has_noops:
        yield Refusal(
            "model", model.model, "some layers have no attention, or kv heads of another number"
        )
    if model.is_encoder_decoder:
        yield Refusal("model", model.model, "encoder-decoder models keep a second cache")
    if model.use_mla:
        yield Refusal("model", model.model, "MLA stores latent vectors, not keys and values")
    if model.is_hybrid or model.is_attention_free:
        yield Refusal("model", model.model, "Mamba and hybrid models keep another kind of state")
    elif _has_sliding_window(model, text):
        yield Refusal("model", model.model, "sliding-window layers already drop old tokens")
    if model.attention_chunk_size is not None:
        yield Refusal("model", model.model, "chunked-local attention already drops old tokens")
    if model.rswa_window is not None:
        yield Refusal(
            "model", model.model, "reference sliding-window attention frees blocks itself"
        )
    if model.is_mm_prefix_lm:
        yield Refusal("model", model.model, "bidirectional prefixes are not causal")
    if getattr(text, "num_kv_shared_layers", 0):
        yield Refusal("model", model.model, "layers share one another's KV cache")


def _has_sliding_window(model: Any, text: Any) -> bool:
    layer_types = getattr(text, "layer_types", None) or ()
    # vLLM takes both words for the same kind (``ModelConfig.is_hybrid``).
    if any(kind not in ("attention", "full_attention") for kind in layer_types):
        return True
    return not layer_types and model.get_sliding_window() is not None


def _parallel(vllm_config: VllmConfig) -> Iterator[Refusal]:
    parallel = vllm_config.parallel_config
    for option in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        size = getattr(parallel, option)
        if size > 1:
            flag = "--" + option.replace("_", "-")
            yield Refusal(
                flag, size, "a band's layers and blocks must be on one rank", f"leave {flag} at 1"
            )
    if parallel.enable_dbo or parallel.use_ubatching:
        yield Refusal("--enable-dbo", True, "a step must be one batch", "leave it off")
    platform = target()
    if platform is not None and parallel.worker_cls != platform.stock_worker:
        yield Refusal(
            "--worker-cls", parallel.worker_cls, "spindle brings its own worker class", "remove it"
        )


def _prefix(vllm_config: VllmConfig, config: SpindleConfig) -> Iterator[Refusal]:
    is_caching = vllm_config.cache_config.enable_prefix_caching
    if config.protected_prefix_tokens == "auto" and not is_caching:
        yield Refusal(
            "protected_prefix_tokens",
            "auto",
            "prefixes are recognised by the prefix cache's hashes, and it is switched off",
            "remove --no-enable-prefix-caching, or give the prefix's length in tokens",
        )


def _profile(vllm_config: VllmConfig, config: SpindleConfig) -> Iterator[Refusal]:
    if config.budget != "measured" or config.head_shares is None:
        return
    model = vllm_config.model_config
    _, shares = config.head_shares[0]
    found = len(shares), len(shares[0])
    has = model.get_num_layers(vllm_config.parallel_config), model.get_total_num_kv_heads()
    if found != has:
        yield Refusal(
            "head_shares",
            f"{found[0]} layers of {found[1]} kv heads",
            f"this model has {has[0]} of {has[1]}",
            "make them again with 'vllm-spindle profile MODEL', or use budget uniform",
        )


def _cache(vllm_config: VllmConfig) -> Iterator[Refusal]:
    cache = vllm_config.cache_config
    if is_quantized_kv_cache(cache.cache_dtype):
        yield Refusal(
            "--kv-cache-dtype",
            cache.cache_dtype,
            "quantised keys cannot be scored yet",
            "use --kv-cache-dtype auto",
        )
    if envs.VLLM_KV_CACHE_LAYOUT == "LHBNC":
        yield Refusal(
            "VLLM_KV_CACHE_LAYOUT",
            envs.VLLM_KV_CACHE_LAYOUT,
            "a block must hold all of its heads: their blocks are moved and dealt out together",
            "remove it",
        )
    if cache.kv_sharing_fast_prefill:
        yield Refusal("--kv-sharing-fast-prefill", True, "prompts are cut short", "leave it off")
    if cache.kv_offloading_size is not None:
        yield Refusal(
            "--kv-offloading-size",
            cache.kv_offloading_size,
            "offloaded blocks would miss the reduction",
            "remove it",
        )
    elif vllm_config.kv_transfer_config is not None:
        yield Refusal(
            "--kv-transfer-config",
            vllm_config.kv_transfer_config.kv_connector,
            "a KV connector copies blocks that the reduction rewrites",
            "remove it",
        )


def _scheduling(vllm_config: VllmConfig) -> Iterator[Refusal]:
    scheduler = vllm_config.scheduler_config
    # vLLM sets it itself where there is a connector, which is refused already.
    if scheduler.disable_hybrid_kv_cache_manager and vllm_config.kv_transfer_config is None:
        yield Refusal(
            "--disable-hybrid-kv-cache-manager",
            True,
            "bands are separate KV-cache groups",
            "remove it",
        )
    if scheduler.scheduler_cls is not None:
        yield Refusal(
            "--scheduler-cls",
            scheduler.scheduler_cls,
            "spindle brings its own scheduler class",
            "remove it",
        )
    if vllm_config.speculative_config is not None:
        yield Refusal(
            "--speculative-config",
            vllm_config.speculative_config.method,
            "drafts would read and extend a reduced cache",
            "remove it",
        )


def _bands(vllm_config: VllmConfig, config: SpindleConfig) -> Iterator[Refusal]:
    num_layers = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
    num_bands = config.num_bands or default_num_bands(num_layers)
    if num_layers < num_bands:
        yield Refusal(
            "num_bands",
            num_bands,
            f"the model has only {num_layers} layers",
            f"leave num_bands out, or set it to at most {num_layers}",
        )


def _codebooks(vllm_config: VllmConfig, config: SpindleConfig) -> Iterator[Refusal]:
    model = vllm_config.model_config
    platform = target()
    if config.merges and platform is not None and model.dtype not in platform.codebook_dtypes:
        good = [str(dtype).removeprefix("torch.") for dtype in platform.codebook_dtypes]
        yield Refusal(
            "--dtype",
            str(model.dtype).removeprefix("torch."),
            f"codebooks are kept in {' or '.join(good)}",
            f"use --dtype {good[0]}, or method evict",
        )
    block_size = vllm_config.cache_config.block_size
    if config.merges and block_size % 16:
        yield Refusal(
            "--block-size",
            block_size,
            "the codebook kernel reads 16 tokens at a time",
            "use a multiple of 16, or method evict",
        )
