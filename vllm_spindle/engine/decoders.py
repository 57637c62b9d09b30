"""The compiled kernel that reads a layer's codebooks: numba's for vLLM's CPU cache, or Triton's."""

from typing import Any, Protocol

import torch
from torch import Tensor

from vllm_spindle.engine.cache_layout import CacheLayout
from vllm_spindle.engine.prompt_tokens import ReducedLayer
from vllm_spindle.kernels.decode_rows import DeviceRows

CPU_BACKEND = "CPU_ATTN"  # vLLM's name for it


class Decoder(Protocol):
    """Attends over regions, tails and prefixes of reduced rows."""

    def __call__(self, query: Tensor, output: Tensor, kv_cache: Tensor, rows: DeviceRows) -> Any:
        """Write the reduced rows' part of ``output``, [Q, H, D], and nothing else of it."""


def make_decoder(layer: ReducedLayer, backend: str, layout: CacheLayout) -> Decoder:
    """The kernel for one layer.

    Args:
        layer: with a rotary table.
        backend: name of the stock attention backend, which packs the cache.
        layout: as it was found to pack it.
    """
    assert layer.cos_sin is not None
    if backend != CPU_BACKEND:
        from vllm_spindle.kernels.device_decode import DeviceRegionDecoder

        return DeviceRegionDecoder(layer.cos_sin, layer.scale)
    # Not before vLLM has started: its kernel registration trips over numba's modules.
    from vllm_spindle.kernels.decode import RegionDecoder

    # The kernel knows vLLM's usual packing by heart; another one it reads through tables.
    is_usual = layout.key_strides == (1, layer.kv_cache.shape[2]) and layout.value_strides == (
        layer.cos_sin.shape[1],
        1,
    )
    return RegionDecoder(
        layer.cos_sin,
        layer.scale,
        key_index=None if is_usual else layout.key_index,
        value_index=None if is_usual else layout.value_index,
        num_threads=torch.get_num_threads(),
    )


def warm_up(decoder: Any, layer: ReducedLayer, num_heads: int, backend: str) -> None:
    """Compile the kernel at start-up: one sham query over one tail token of an unused block."""
    # Of Triton's there are two: what is not split is written as it shall be, the rest merged.
    kinds = ({},) if backend == CPU_BACKEND else ({"num_splits": 1}, {"num_splits": 2})
    cache = layer.kv_cache
    query = torch.zeros(1, num_heads, cache.shape[-1] // 2, dtype=cache.dtype, device=cache.device)

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=cache.device)

    rows = DeviceRows(
        block_table=ints(1).view(1, 1),
        starts=ints(0, 0).view(1, 2),
        shapes=ints(0, 0, 0).view(1, 3),
        tail_lens=ints(1),
        query_start=ints(0, 1),
        prefix_blocks=ints(0),
        max_query_len=1,
    )
    for options in kinds:
        decoder(query, torch.empty_like(query), cache, rows, **options)
