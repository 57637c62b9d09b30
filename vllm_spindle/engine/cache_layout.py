"""Where a token's key and value lie inside a cache block.

vLLM's CPU kernels pack keys (transposed, or in pairs for AMX) and may pack values. The packing
is found out once, by writing coded numbers through the cache's own write operation, instead of
being copied from kernel sources that change.

Shapes: B blocks, K kv heads, N tokens per block, D head size, n blocks read.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Codes are written as digits below this, so that they are exact in bf16 (8 bits of mantissa).
DIGIT_BASE = 128

CacheWriter = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""``(keys [T, K, D], values [T, K, D], kv_cache, slot_mapping [T])``: vLLM's cache write."""


@dataclass(frozen=True)
class CacheLayout:
    """Flat offsets inside the ``N * 2 * D`` elements that one block holds for one kv head.

    Attributes:
        key_index: offset of each (token, dim) of the keys. [N, D], int64.
        value_index: the same for the values.
        key_strides: strides of (token, dim) where the keys' offsets are affine in both, else None.
        value_strides: the same for the values.
    """

    key_index: Tensor
    value_index: Tensor
    key_strides: tuple[int, int] | None
    value_strides: tuple[int, int] | None

    @classmethod
    def of(cls, key_index: Tensor, value_index: Tensor) -> "CacheLayout":
        """The layout that these offsets describe."""
        return cls(key_index, value_index, _affine_strides(key_index), _affine_strides(value_index))

    def read(self, kv_cache: Tensor, block_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the given blocks, in token order.

        Args:
            kv_cache: [B, K, N, 2 * D].
            block_ids: [n], int64.

        Returns:
            keys and values, [K, n * N, D] each, contiguous, in the cache's dtype.
        """
        blocks = kv_cache.index_select(0, block_ids).contiguous()
        return (
            _unpack(blocks, self.key_index, self.key_strides),
            _unpack(blocks, self.value_index, self.value_strides),
        )


def _unpack(blocks: Tensor, index: Tensor, strides: tuple[int, int] | None) -> Tensor:
    """[n, K, N, 2 * D] packed -> [K, n * N, D]."""
    num_blocks, num_kv_heads, block_size, width = blocks.shape
    shape = (num_kv_heads, num_blocks * block_size, width // 2)
    per_head = block_size * width
    if strides is None:
        flat = blocks.view(num_blocks, num_kv_heads, per_head).transpose(0, 1)
        return flat[..., index.flatten()].reshape(shape)
    # Row-major and transposed packings alike are a view, ten times faster than a gather.
    view = blocks.as_strided(
        (num_kv_heads, num_blocks, block_size, width // 2),
        (per_head, num_kv_heads * per_head, *strides),
        int(index[0, 0]),
    )
    return view.reshape(shape)


def _affine_strides(index: Tensor) -> tuple[int, int] | None:
    """Strides of (token, dim) if the offsets are affine in both; None if they are not."""
    token, dim = int(index[1, 0] - index[0, 0]), int(index[0, 1] - index[0, 0])
    affine = index[0, 0] + token * torch.arange(index.shape[0]).unsqueeze(1)
    affine = affine + dim * torch.arange(index.shape[1])
    return (token, dim) if torch.equal(affine, index) else None


def probe_layout(kv_cache: Tensor, write: CacheWriter) -> CacheLayout:
    """Find the layout of a layer's cache by writing codes into a scratch block.

    Args:
        kv_cache: the layer's cache, [B, K, N, 2 * D]; only its shape and dtype are used.
        write: the cache write of that layer.

    Raises:
        RuntimeError: if a token's elements are not all found inside its own block and head.
    """
    _, num_kv_heads, block_size, width = kv_cache.shape
    num_elements = block_size * width // 2
    codes = torch.arange(1, num_elements + 1)
    slots = torch.arange(block_size, device=kv_cache.device)
    shape = (block_size, 1, width // 2)
    found = torch.zeros(2, block_size * width, dtype=torch.int64)
    place = 1
    while place <= num_elements:
        digits = (codes // place % DIGIT_BASE).to(kv_cache).view(shape)
        tokens = digits.expand(-1, num_kv_heads, -1).contiguous()
        empty = torch.zeros_like(tokens)
        for side, (keys, values) in enumerate(((tokens, empty), (empty, tokens))):
            scratch = _scratch_block(kv_cache)
            write(keys, values, scratch, slots)
            found[side] += scratch[0, -1].reshape(-1).to("cpu", torch.int64) * place
        place *= DIGIT_BASE
    indices = []
    for side, name in enumerate(("keys", "values")):
        order = found[side].argsort(stable=True)[-num_elements:]
        if not torch.equal(found[side][order], codes):
            raise RuntimeError(
                f"spindle: cannot tell how this vLLM packs {name} in a block of {block_size} "
                f"tokens, head size {width // 2}, {kv_cache.dtype}; use another --block-size"
            )
        indices.append(order.view(block_size, width // 2))
    return CacheLayout.of(*indices)


def _scratch_block(kv_cache: Tensor) -> Tensor:
    """One block of zeros with the cache's own strides: heads or tokens may be outermost in it."""
    shape, strides = (1, *kv_cache.shape[1:]), kv_cache.stride()
    num_elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return kv_cache.new_zeros(num_elements).as_strided(shape, strides)
