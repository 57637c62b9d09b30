"""Per attention layer, in the worker: its band's spec, its wrapped backend, its last refusals."""

from typing import Any

from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from vllm_spindle.engine.backend import wrap_backend
from vllm_spindle.engine.options import policy_for, switched_on
from vllm_spindle.engine.refusals import (
    Refusal,
    backend_refusals,
    layer_refusals,
    raise_if_any,
)
from vllm_spindle.engine.spec import SpindleSpec


def spindle_backend(stock: type) -> type:
    """Fills the backend hook: the stock backend, wrapped if spindle is on.

    Raises:
        ValueError: for a backend that ours is not derived from.
    """
    if switched_on(get_current_vllm_config()) is None:
        return stock
    raise_if_any(backend_refusals(stock.get_name()))
    return wrap_backend(stock)


def spindle_spec(layer: Any, vllm_config: VllmConfig, stock: KVCacheSpec | None) -> Any:
    """Fills the spec hook: the layer's band, in place of plain full attention.

    Raises:
        ValueError: for a layer that cannot be reduced.
    """
    config = switched_on(vllm_config)
    if config is None or stock is None:
        return stock
    refusals = layer_refusals(layer)
    if type(stock) is not FullAttentionSpec:
        refusals.append(
            Refusal("model", type(stock).__name__, "this layer's cache is not full attention")
        )
    raise_if_any(refusals)
    policy = policy_for(vllm_config, config)
    band = policy.band_of_layer(extract_layer_index(layer.layer_name))
    return SpindleSpec.of(stock, band=band, policy=policy)
