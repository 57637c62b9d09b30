"""From vLLM's own configuration to ours: the switch, the policy, a request's override."""

import difflib
from functools import lru_cache
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError

from vllm_spindle.config import (
    KEEP_RATIO_KEY,
    PROTECTED_PREFIX_KEY,
    RequestOptions,
    SpindleConfig,
    load_config,
    parse_keep_ratio,
    parse_protected_prefix,
    with_profile,
)
from vllm_spindle.policy import SpindlePolicy

SECTION = "spindle"
REQUEST_KEYS = {KEEP_RATIO_KEY: parse_keep_ratio, PROTECTED_PREFIX_KEY: parse_protected_prefix}


def asked_for(vllm_config: VllmConfig) -> SpindleConfig | None:
    """The configuration under ``additional_config["spindle"]``; None if there is none.

    Raises:
        ValueError: if it is not valid.
    """
    section = _additional(vllm_config).get(SECTION)
    return None if section is None else load_config(section)


def switched_on(vllm_config: VllmConfig) -> SpindleConfig | None:
    """The configuration if it may evict anything; None means that the engine is stock."""
    config = asked_for(vllm_config)
    return config if config is not None and config.is_on else None


def resolve(vllm_config: VllmConfig, config: SpindleConfig) -> None:
    """Write the options themselves where the user may have given a file's path.

    Workers may run in another folder or on another host, and must not read the file again.
    """
    _additional(vllm_config)[SECTION] = config.model_dump()


def fit(vllm_config: VllmConfig, config: SpindleConfig) -> SpindleConfig:
    """The configuration for this model: what was measured on it beside what was asked for.

    Raises:
        ValueError: if it asks for a profile that there is not.
    """
    return with_profile(config, vllm_config.model_config.model)


def first_kv_head(vllm_config: VllmConfig, rank: int) -> int:
    """Of all of a layer's kv heads, the first one that a tensor-parallel rank has."""
    total = vllm_config.model_config.get_total_num_kv_heads()
    return rank * total // vllm_config.parallel_config.tensor_parallel_size


def policy_for(vllm_config: VllmConfig, config: SpindleConfig) -> SpindlePolicy:
    """The policy for this model under this configuration."""
    model_config = vllm_config.model_config
    parallel_config = vllm_config.parallel_config
    num_kv_heads = model_config.get_num_kv_heads(parallel_config)
    return _policy(
        config,
        model_config.get_num_layers(parallel_config),
        vllm_config.cache_config.block_size,
        model_config.get_num_attention_heads(parallel_config) // num_kv_heads,
    )


@lru_cache(maxsize=8)
def _policy(
    config: SpindleConfig, num_layers: int, block_size: int, num_queries_per_kv: int
) -> SpindlePolicy:
    return SpindlePolicy(config, num_layers, block_size, num_queries_per_kv)


def request_options(params: Any) -> RequestOptions:
    """What the request sets for itself, checked at admission."""
    extra_args = getattr(params, "extra_args", None) or {}
    keep_ratio, protected = map(extra_args.get, REQUEST_KEYS)
    return RequestOptions(
        None if keep_ratio is None else float(keep_ratio),
        None if protected is None else int(protected),
    )


def protect_prefix(params: Any, num_tokens: int) -> Any:
    """The request's parameters, as if it had asked for this protected prefix itself.

    The way from the scheduler, which finds prefixes, to the workers, which plan alike.
    """
    params = params.clone()
    params.extra_args = {**(params.extra_args or {}), PROTECTED_PREFIX_KEY: num_tokens}
    return params


def check_request(vllm_config: VllmConfig, prompt: Any, params: Any, resumable: bool) -> None:
    """Refuse a request that cannot be served as it asks, before it is admitted.

    Raises:
        VLLMValidationError: HTTP 400 for this request.
    """
    on = switched_on(vllm_config) is not None
    if on and resumable:
        raise VLLMValidationError(
            "streaming-input sessions are not supported with spindle: the prompt grows after it "
            "was reduced; send the whole prompt in one request",
            parameter="resumable",
        )
    extra_args = getattr(params, "extra_args", None) or {}
    for key in extra_args:
        if key.startswith("spindle") and key not in REQUEST_KEYS:
            near = difflib.get_close_matches(key, REQUEST_KEYS, n=1, cutoff=0) or [KEEP_RATIO_KEY]
            raise VLLMValidationError(
                f"unknown option {key!r}; did you mean {near[0]!r}?", parameter=key
            )
    parsed: dict[str, Any] = {}
    for key in REQUEST_KEYS.keys() & extra_args.keys():
        try:
            parsed[key] = REQUEST_KEYS[key](extra_args[key])
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter=key, value=extra_args[key]) from None
    if not on and parsed.get(KEEP_RATIO_KEY, 1) < 1:
        raise VLLMValidationError(
            "this server runs without spindle, so it cannot reduce one request's KV cache; "
            'start it with --additional-config \'{"spindle": {"keep_ratio": ...}}\' below 1',
            parameter=KEEP_RATIO_KEY,
            value=extra_args[KEEP_RATIO_KEY],
        )


def check_beam_search(vllm_config: VllmConfig) -> None:
    """Refuse a beam search where it would be full KV, unnoticed.

    vLLM asks for each of its tokens with a prompt of its own, whose first token comes before the
    reduction: nothing that was reduced is ever read.

    Raises:
        VLLMValidationError: HTTP 400 for this request.
    """
    if switched_on(vllm_config) is not None:
        raise VLLMValidationError(
            "beam search is not supported with spindle: vLLM computes each of its tokens from a "
            "new prompt, of which nothing would be reduced; sample with n, or serve without "
            "spindle",
            parameter="use_beam_search",
        )


def _additional(vllm_config: VllmConfig) -> dict[str, Any]:
    additional = vllm_config.additional_config
    return additional if isinstance(additional, dict) else {}
