"""One layer of a transformers model with an attention function of our own, for a while."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ATTENTION = "covipal_layer"


@contextmanager
def attention_of_layer(attention: Any, function: Any) -> Iterator[None]:
    """Another attention function for one layer: it has a configuration of its own meanwhile.

    Args:
        attention: the layer's attention module.
        function: as transformers' ``AttentionInterface`` takes it: (module, query, key, value,
            mask, **options), positions applied. Query [B, H, T, S], key and value [B, K, T, S].
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, function)
    config = attention.config
    attention.config = copy.copy(config)
    attention.config._attn_implementation_internal = ATTENTION
    try:
        yield
    finally:
        attention.config = config
