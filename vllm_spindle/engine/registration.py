"""Make the spec known to vLLM's registry, with its manager."""

from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_spindle.engine.manager import SpindleManager
from vllm_spindle.engine.spec import SpindleSpec


def register_spec() -> None:
    """Register ``SpindleSpec``; safe to call again.

    The built-in specs are registered first: vLLM registers them only while the registry is
    empty, so ours, coming first, would shut them out.
    """
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(
        SpindleSpec, manager_class=SpindleManager, uniform_type_base_spec=SpindleSpec
    )
