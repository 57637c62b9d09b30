"""The packing of the real cache write, found out and undone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.engine

NUM_KV_HEADS = 3
NUM_BLOCKS = 5


def _cpu_write(isa: str) -> Callable[..., None]:
    """vLLM's CPU cache write, as its attention implementation calls it."""
    from vllm import _custom_ops as ops

    def write(keys: Any, values: Any, kv_cache: Any, slots: Any) -> None:
        num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
        split = kv_cache.view(num_blocks, num_kv_heads, block_size * 2, -1)
        key_cache, value_cache = split.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, slots, isa)

    return write


def _amx_like_write(keys: Any, values: Any, kv_cache: Any, slots: Any) -> None:
    """Pairs of dims side by side for every token, as AMX wants its tiles: not affine."""
    _, num_kv_heads, block_size, width = kv_cache.shape
    flat = kv_cache.view(len(kv_cache), num_kv_heads, 2, block_size, width // 2)
    for token, slot in enumerate(slots.tolist()):
        block, row = divmod(slot, block_size)
        packed = flat[block, :, 0].view(num_kv_heads, width // 4, block_size, 2)
        packed[:, :, row] = keys[token].view(num_kv_heads, width // 4, 2)
        flat[block, :, 1, row] = values[token]


def _cache(dtype: torch.dtype, head_size: int, block_size: int) -> torch.Tensor:
    return torch.zeros(NUM_BLOCKS, NUM_KV_HEADS, block_size, 2 * head_size, dtype=dtype)


def _assert_round_trip(write: Callable[..., None], cache: torch.Tensor) -> None:
    from vllm_spindle.engine.cache_layout import probe_layout

    _, num_kv_heads, block_size, width = cache.shape
    torch.manual_seed(0)
    layout = probe_layout(cache, write)
    assert not cache.any(), "probing must leave the cache alone"
    num_tokens = 2 * block_size + block_size // 2
    keys, values = torch.randn(2, num_tokens, num_kv_heads, width // 2).to(cache.dtype)
    blocks = torch.tensor([3, 1, 4])
    slots = (blocks.unsqueeze(1) * block_size + torch.arange(block_size)).flatten()[:num_tokens]
    write(keys, values, cache, slots)
    read_keys, read_values = layout.read(cache, blocks)
    assert torch.equal(read_keys[:, :num_tokens].transpose(0, 1), keys)
    assert torch.equal(read_values[:, :num_tokens].transpose(0, 1), values)


@pytest.mark.parametrize("isa", ["vec", "vec16"])
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("head_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_the_cpu_op_writes_is_read_back(
    dtype: torch.dtype, head_size: int, block_size: int, isa: str
) -> None:
    """Bit for bit, in token order, whatever the order of the blocks."""
    _assert_round_trip(_cpu_write(isa), _cache(dtype, head_size, block_size))


def test_a_paired_packing_is_read_back() -> None:
    """A packing that no strides describe goes through the gather instead."""
    _assert_round_trip(_amx_like_write, _cache(torch.bfloat16, 64, 32))


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this CPU has no AMX")
@pytest.mark.parametrize("block_size", [32, 128])
def test_what_the_amx_op_writes_is_read_back(block_size: int) -> None:
    """The real AMX packing, where there is one."""
    _assert_round_trip(_cpu_write("amx"), _cache(torch.bfloat16, 64, block_size))


def test_a_layout_that_cannot_be_told_raises() -> None:
    """A write that loses a token is noticed, and the message names block, head and dtype."""
    from vllm_spindle.engine.cache_layout import probe_layout

    def lossy(keys: Any, values: Any, kv_cache: Any, slots: Any) -> None:
        _cpu_write("vec")(keys[1:], values[1:], kv_cache, slots[1:])

    message = r"how this vLLM packs keys in a block of 32 tokens, head size 64, .*--block-size"
    with pytest.raises(RuntimeError, match=message):
        probe_layout(_cache(torch.bfloat16, 64, 32), lossy)
