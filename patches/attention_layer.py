"""Hook: give an attention layer another KV-cache spec, and its backend a subclass.

``AttentionBackend.customize_spec`` is not told which layer it is asked for, and the attention
backend is looked up per configuration, never per plugin: a spec that differs by depth, and a
wrapper around whichever backend the user chose, have no official way in.
"""

import functools
from collections.abc import Callable
from typing import Any

from vllm.model_executor.layers.attention import attention

from vllm_spindle_patches.guard import is_applied, mark_applied, require_parameters

SpecHook = Callable[[Any, Any, Any], Any]
BackendHook = Callable[[type], type]


def apply(kv_cache_spec: SpecHook, attn_backend: BackendHook) -> None:
    """Fill both hooks; a second call replaces the callbacks.

    Args:
        kv_cache_spec: ``(layer, vllm_config, stock spec) -> spec``.
        attn_backend: ``stock backend class -> backend class``, for every ``Attention`` layer.
    """
    _patch_spec(kv_cache_spec)
    _patch_backend(attn_backend)


def _patch_spec(hook: SpecHook) -> None:
    owner = attention.Attention
    stock = require_parameters(owner, "get_kv_cache_spec", "self", "vllm_config")
    stock = stock.__wrapped__ if is_applied(stock) else stock

    @functools.wraps(stock)
    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        return hook(self, vllm_config, stock(self, vllm_config))

    owner.get_kv_cache_spec = mark_applied(get_kv_cache_spec)


def _patch_backend(hook: BackendHook) -> None:
    stock = require_parameters(attention, "get_attn_backend", "head_size", "kv_cache_dtype")
    stock = stock.__wrapped__ if is_applied(stock) else stock

    @functools.wraps(stock)
    def get_attn_backend(*args: Any, **kwargs: Any) -> type:
        return hook(stock(*args, **kwargs))

    attention.get_attn_backend = mark_applied(get_attn_backend)
