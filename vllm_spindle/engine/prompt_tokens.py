"""Keys and values of an ended prompt in one layer: as tensors on the CPU, in the cache on a GPU.

On the CPU, whose kernels pack blocks as they like, they are unpacked first, scored by our compiled
kernel or by torch, and written back by vLLM's own cache write. Elsewhere our Triton kernels score
and move them where they lie; only codebooks want them as tensors.

Shapes: K kv heads, G query heads per kv head, T prompt tokens, N tokens kept, R blocks of a region,
n tokens per block, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vllm_spindle.core.eviction import gather_kept
from vllm_spindle.core.scoring import CachedKeys
from vllm_spindle.core.transfer import to_device
from vllm_spindle.engine.cache_layout import CacheLayout
from vllm_spindle.engine.head_table import pages


@dataclass(frozen=True)
class ReducedLayer:
    """One attention layer of a band, as the reduction needs it.

    Attributes:
        layer_idx: depth in the model.
        kv_cache: the layer's cache. [B, K, n, 2 * D].
        scale: softmax scale.
        write: vLLM's own cache write for this layer.
        cos_sin: the model's rotary table, [P, D]; None where no codebook needs it.
    """

    layer_idx: int
    kv_cache: Tensor
    scale: float
    write: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    cos_sin: Tensor | None = None


class PromptTokens(Protocol):
    """A prompt's keys and values in one layer."""

    @property
    def keys(self) -> Tensor | CachedKeys:
        """Rotated keys of T tokens, for ``core.choice``."""

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values of T tokens and the rest of their last block. [K, T.., D] each."""

    def keep(self, kept: Tensor, region: Tensor) -> None:
        """Fill the region's blocks, [R], with kept tokens: positions [K, N] or [K, G, N]."""

    def keep_by_head(self, kept: list[Tensor], region: Tensor) -> None:
        """Fill the region's pages with those of one head after the other, in whole blocks each."""


class TensorTokens:
    """As tensors."""

    def __init__(self, layer: ReducedLayer, keys: Tensor, values: Tensor, prompt_len: int) -> None:
        """Args: keys, values: [K, T.., D]; prompt_len: T."""
        self._layer, self._tokens, self._prompt_len = layer, (keys, values), prompt_len

    @property
    def keys(self) -> Tensor | CachedKeys:
        """Of the prompt, for the compiled kernel where there is one for them."""
        # Not before vLLM has started: its kernel registration trips over numba's modules.
        from vllm_spindle.kernels.host_scoring import host_keys

        return host_keys(self._tokens[0][:, : self._prompt_len])

    def read(self) -> tuple[Tensor, Tensor]:
        """As they are."""
        return self._tokens

    def keep(self, kept: Tensor, region: Tensor) -> None:
        """One copy after the other, where query heads keep tokens of their own."""
        layer, (keys, values) = self._layer, self._tokens
        slots = self._slots(region)
        copies = kept.unbind(1) if kept.dim() == 3 else (kept,)
        for copy, copy_slots in zip(copies, slots.chunk(len(copies)), strict=True):
            if len(copy_slots):
                layer.write(
                    gather_kept(keys, copy).transpose(0, 1).contiguous(),
                    gather_kept(values, copy).transpose(0, 1).contiguous(),
                    layer.kv_cache,
                    copy_slots,
                )

    def keep_by_head(self, kept: list[Tensor], region: Tensor) -> None:
        """Into pages: rows of one kv head."""
        layer, (keys, values) = self._layer, self._tokens
        cache, apart = pages(layer.kv_cache)
        own = region.unsqueeze(1) * apart + torch.arange(len(kept), device=region.device)
        slots = self._slots(own.flatten())
        if len(slots):
            layer.write(_rows(keys, kept), _rows(values, kept), cache, slots)

    def _slots(self, blocks: Tensor) -> Tensor:
        block_size = self._layer.kv_cache.shape[2]
        places = torch.arange(block_size, device=blocks.device)
        return (blocks.unsqueeze(1) * block_size + places).flatten()


def _rows(tokens: Tensor, kept: list[Tensor]) -> Tensor:
    """Kept rows of each kv head, one after the other, as pages hold them. [N, 1, D].

    tokens: [K, T, D].
    """
    return torch.cat([tokens[head, each] for head, each in enumerate(kept)]).unsqueeze(1)


class PagedTokens:
    """In the cache, for kernels."""

    def __init__(
        self, layer: ReducedLayer, layout: CacheLayout, blocks: Tensor, prompt_len: int
    ) -> None:
        """Args: blocks: the prompt's, int64, on the device; prompt_len: T."""
        # Not before vLLM has started, as it decides which Triton there is.
        from vllm_spindle.kernels.device_scoring import PagedKeys

        self._cache, self._layout, self._blocks = layer.kv_cache, layout, blocks
        self.keys = PagedKeys(layer.kv_cache, blocks, prompt_len)

    def read(self) -> tuple[Tensor, Tensor]:
        """A copy."""
        return self._layout.read(self._cache, self._blocks)

    def keep(self, kept: Tensor, region: Tensor) -> None:
        """Page (r, k) holds the r-th n tokens of head k; of copies, the first one's come first."""
        num_heads, block_size = self._cache.shape[1:3]
        positions = kept.reshape(num_heads, len(region), block_size).transpose(0, 1)
        self._compact(positions, region)

    def keep_by_head(self, kept: list[Tensor], region: Tensor) -> None:
        """Pages in the region's order."""
        num_heads, block_size = self._cache.shape[1:3]
        counts = [len(each) // block_size for each in kept]
        heads = [head for head, count in enumerate(counts) for _ in range(count)]
        own = to_device(torch.tensor(heads, dtype=torch.int32), region.device)
        positions = torch.cat(kept).view(-1, num_heads, block_size)
        self._compact(positions, region, heads=own.view(-1, num_heads))

    def _compact(self, positions: Tensor, region: Tensor, heads: Tensor | None = None) -> None:
        from vllm_spindle.kernels.device_compaction import compact

        compact(self._cache, self._blocks, positions, region, heads=heads)


def read_in_place(layout: CacheLayout, kv_cache: Tensor) -> bool:
    """Whether blocks are packed as our kernels read them: of each token its key, then its value."""
    head_size = kv_cache.shape[-1] // 2
    strides = (2 * head_size, 1)
    return (
        (layout.key_strides, layout.value_strides) == (strides, strides)
        and int(layout.key_index[0, 0]) == 0
        and int(layout.value_index[0, 0]) == head_size
    )
