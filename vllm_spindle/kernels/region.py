"""Codebooks into the blocks of a region, and out of them.

Shapes: B blocks of the cache, R blocks of the region, K kv heads, n tokens per block, E entries,
N tokens, D head size. The layout is drawn in ``region_shape.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_spindle.core.codebook import Codebook
from vllm_spindle.kernels.region_shape import (
    ARRAY_ELEMENTS,
    EMPTY,
    KEY_CODES,
    KEY_NORMS,
    POSITION_BITS,
    POSITIONS,
    VALUE_CODES,
    VALUE_NORMS,
    RegionShape,
)

MAX_NORM = torch.finfo(torch.float16).max


@dataclass(frozen=True, slots=True)
class RegionContent:
    """What a region holds, as read back: entries and norms as rounded, tokens as sorted.

    Attributes:
        key_entries: zero rows where a head uses fewer than the capacity. [K, E_K, D], bf16.
        value_entries: [K, E_V, D], bf16.
        key_codes: ascending; meaningless where a slot is empty, as all that follows. [K, N], int64.
        value_codes: [K, N], int64.
        key_norms: [K, N], float16.
        value_norms: [K, N], float16.
        positions: negative where a slot is empty. [K, N], int64.
    """

    key_entries: Tensor
    value_entries: Tensor
    key_codes: Tensor
    value_codes: Tensor
    key_norms: Tensor
    value_norms: Tensor
    positions: Tensor


def pack_region(
    kv_cache: Tensor,
    block_ids: Tensor,
    shape: RegionShape,
    key_codebooks: Sequence[Codebook],
    value_codebooks: Sequence[Codebook],
    positions: Sequence[Tensor],
) -> None:
    """Write one layer's codebooks into the blocks of a region; the rest of them becomes zero.

    Key entries are numbered anew by their first token, so that a reader goes through positions
    nearly in order as well.

    Args:
        kv_cache: [B, K, n, 2 * D], bf16, contiguous.
        block_ids: the region, in order. [R], int64.
        shape: capacities.
        key_codebooks: one per kv head, of un-rotated keys.
        value_codebooks: one per kv head.
        positions: of each kv head's tokens. K times [n], n at most N.

    Raises:
        ValueError: if a codebook or the whole does not fit.
    """
    num_kv_heads = kv_cache.shape[1]
    if shape.num_blocks > len(block_ids):
        raise ValueError(f"the region needs {shape.num_blocks} blocks, got {len(block_ids)}")
    rows = torch.zeros(
        num_kv_heads, 2 * shape.block_size * len(block_ids), shape.head_size, dtype=torch.int16
    )
    books = zip(key_codebooks, value_codebooks, positions, strict=True)
    for head, (keys, values, places) in enumerate(books):
        if len(places) > shape.num_tokens:
            raise ValueError(f"{len(places)} tokens do not fit a region for {shape.num_tokens}")
        _check_fits("keys", keys, shape.num_key_entries, len(places))
        _check_fits("values", values, shape.num_value_entries, len(places))
        order, key_codes, first_seen = _by_first_token(keys.codes, len(keys.entries))
        rows[head, : len(keys.entries)] = _bits(_paired(keys.entries[first_seen]))
        first = shape.num_key_entries
        rows[head, first : first + len(values.entries)] = _bits(values.entries)
        arrays = {
            KEY_CODES: key_codes.to(torch.uint16),
            VALUE_CODES: values.codes[order].to(torch.uint16),
            KEY_NORMS: keys.norms[order].clamp(max=MAX_NORM).half(),
            VALUE_NORMS: values.norms[order].clamp(max=MAX_NORM).half(),
            POSITIONS: _split(places[order]),
        }
        flat = rows[head].view(-1)
        start, stop = _span(shape, POSITIONS)
        flat[start + 1 : stop : 2] = EMPTY
        for name, array in arrays.items():
            start, _ = _span(shape, name)
            flat[start : start + ARRAY_ELEMENTS[name] * len(places)] = array.view(torch.int16)
    blocks = rows.view(num_kv_heads, len(block_ids), *kv_cache.shape[2:]).transpose(0, 1)
    kv_cache.view(torch.int16)[block_ids] = blocks.to(kv_cache.device)


def unpack_region(kv_cache: Tensor, block_ids: Tensor, shape: RegionShape) -> RegionContent:
    """Read a region back.

    Args:
        kv_cache: [B, K, n, 2 * D], bf16.
        block_ids: [R], int64.
        shape: as it was packed.
    """
    num_kv_heads = kv_cache.shape[1]
    rows = kv_cache[block_ids].transpose(0, 1).reshape(num_kv_heads, -1, shape.head_size)
    flat = rows.reshape(num_kv_heads, -1)

    def array(name: int, dtype: torch.dtype) -> Tensor:
        start, stop = _span(shape, name)
        return flat[:, start:stop].contiguous().view(dtype)

    first, stop = shape.num_key_entries, shape.num_key_entries + shape.num_value_entries
    low, high = array(POSITIONS, torch.int16).long().view(num_kv_heads, -1, 2).unbind(-1)
    return RegionContent(
        key_entries=_unpaired(rows[:, :first]),
        value_entries=rows[:, first:stop],
        key_codes=array(KEY_CODES, torch.uint16).long(),
        value_codes=array(VALUE_CODES, torch.uint16).long(),
        key_norms=array(KEY_NORMS, torch.float16),
        value_norms=array(VALUE_NORMS, torch.float16),
        positions=torch.where(high == EMPTY, -1, (high << POSITION_BITS) + low),
    )


def _check_fits(name: str, codebook: Codebook, capacity: int, num_tokens: int) -> None:
    if len(codebook.entries) > capacity or len(codebook.codes) != num_tokens:
        raise ValueError(
            f"a codebook of {len(codebook.codes)} {name} in {len(codebook.entries)} entries does "
            f"not fit {num_tokens} tokens in {capacity}"
        )


def _by_first_token(codes: Tensor, num_entries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens sorted by entry, entries by their first token.

    For codes ``[2, 0, 2, 1]``: order ``[0, 2, 1, 3]``, sorted codes ``[0, 0, 1, 2]``, old numbers
    of the entries ``[2, 0, 1]``. Entries that nothing uses come last.
    """
    num_tokens = len(codes)
    first = torch.full((num_entries,), num_tokens, dtype=torch.int64)
    first.scatter_reduce_(0, codes, torch.arange(num_tokens), reduce="amin")
    first_seen = first.argsort(stable=True)
    renumbered = torch.empty_like(first_seen)
    renumbered[first_seen] = torch.arange(num_entries)
    sorted_codes, order = renumbered[codes].sort(stable=True)
    return order, sorted_codes, first_seen


def _split(positions: Tensor) -> Tensor:
    """Lower bits and the rest, in turn. [2 N], int16."""
    low = positions & ((1 << POSITION_BITS) - 1)
    return torch.stack([low, positions >> POSITION_BITS], dim=-1).flatten().to(torch.int16)


def _span(shape: RegionShape, name: int) -> tuple[int, int]:
    """Elements [start, stop) of a per-token array in a head's run."""
    start = shape.array_first_rows[name] * shape.head_size
    return start, start + ARRAY_ELEMENTS[name] * shape.num_tokens


def _paired(entries: Tensor) -> Tensor:
    """The dimensions i and i + D / 2, which turn together, side by side. [., D]."""
    return torch.stack(entries.chunk(2, dim=-1), dim=-1).flatten(-2)


def _unpaired(entries: Tensor) -> Tensor:
    """The reverse of ``_paired``."""
    return torch.cat([entries[..., ::2], entries[..., 1::2]], dim=-1)


def _bits(entries: Tensor) -> Tensor:
    return entries.to(torch.bfloat16).view(torch.int16)
