"""Codebook regions: the geometry in integers, and codebooks through blocks and back."""

import pytest
import torch

from vllm_spindle.core.codebook import Codebook, greedy_cover, reconstruct
from vllm_spindle.core.rotary import rotate_keys
from vllm_spindle.kernels.region import pack_region, unpack_region
from vllm_spindle.kernels.region_shape import MAX_ENTRIES, RegionShape, array_rows, entry_capacity


def _codebook(num_entries: int, num_tokens: int, head_size: int) -> Codebook:
    entries = torch.nn.functional.normalize(torch.randn(num_entries, head_size), dim=-1)
    return Codebook(
        entries=entries.bfloat16().float(),
        codes=torch.randint(0, num_entries, (num_tokens,)),
        norms=(torch.rand(num_tokens) * 9).half().float(),
        similarity=torch.ones(num_tokens),
    )


def _packed(num_heads: int, shape: RegionShape, num_spare: int = 2):
    """A cache of random blocks with a region in it: cache, blocks, codebooks, positions."""
    num_blocks = shape.num_blocks + num_spare
    cache = torch.randn(num_blocks, num_heads, shape.block_size, 2 * shape.head_size).bfloat16()
    blocks = torch.randperm(num_blocks)[: shape.num_blocks]
    keys = [
        _codebook(shape.num_key_entries, shape.num_tokens, shape.head_size)
        for _ in range(num_heads)
    ]
    values = [
        _codebook(shape.num_value_entries, shape.num_tokens, shape.head_size)
        for _ in range(num_heads)
    ]
    positions = torch.stack(
        [torch.randperm(2 * shape.num_tokens + 1)[: shape.num_tokens] for _ in range(num_heads)]
    )
    untouched = cache.clone()
    pack_region(cache, blocks, shape, keys, values, positions)
    return untouched, cache, blocks, keys, values, positions


@pytest.mark.parametrize("head_size", [32, 64, 80, 128])
@pytest.mark.parametrize(("num_tokens", "block_size"), [(1, 16), (77, 16), (333, 32)])
def test_round_trip(num_tokens: int, block_size: int, head_size: int) -> None:
    """Every token's key, value and position come back, in bf16 entries and float16 norms."""
    torch.manual_seed(num_tokens)
    shape = RegionShape(num_tokens // 3 + 1, num_tokens // 2 + 1, num_tokens, block_size, head_size)
    _, cache, blocks, keys, values, positions = _packed(3, shape)
    content = unpack_region(cache, blocks, shape)
    for head in range(3):
        order = content.positions[head].argsort()
        expected_order = positions[head].argsort()
        assert torch.equal(content.positions[head][order].long(), positions[head][expected_order])
        assert (content.key_codes[head].diff() >= 0).all()
        for name, codebook in (("key", keys[head]), ("value", values[head])):
            entries = getattr(content, f"{name}_entries")[head].float()
            codes = getattr(content, f"{name}_codes")[head]
            norms = getattr(content, f"{name}_norms")[head].float()
            got = entries[codes] * norms.unsqueeze(-1)
            assert torch.equal(got[order], reconstruct(codebook)[expected_order])


def test_other_blocks_and_spare_rows() -> None:
    """Blocks outside the region keep their bits; rows of the region without use are zero."""
    shape = RegionShape(5, 6, 40, 32, 64)
    before, cache, blocks, *_ = _packed(2, shape)
    others = torch.ones(len(cache), dtype=torch.bool)
    others[blocks] = False
    assert others.any() and torch.equal(cache[others], before[others])
    rows = cache[blocks].transpose(0, 1).reshape(2, -1, 64)
    assert (rows[:, shape.num_rows :].view(torch.int16) == 0).all()


def test_fewer_entries_than_capacity() -> None:
    """A head that needs fewer entries leaves zero rows, and its neighbours are not disturbed."""
    shape = RegionShape(12, 9, 50, 16, 32)
    cache = torch.full((shape.num_blocks, 2, 16, 64), float("nan")).bfloat16()
    books = [_codebook(size, 50, 32) for size in (3, 12, 1, 9)]
    positions = torch.arange(50).expand(2, -1)
    blocks = torch.arange(shape.num_blocks)
    pack_region(cache, blocks, shape, books[:2], books[2:], positions)
    content = unpack_region(cache, blocks, shape)
    assert (content.key_entries[0, 3:] == 0).all() and (content.value_entries[0, 1:] == 0).all()
    assert content.key_codes[0].max() <= 2 and content.value_codes[0].max() == 0


def test_fewer_tokens_than_slots() -> None:
    """A head that admits fewer leaves its last slots empty, another fills all, a third none."""
    shape = RegionShape(12, 9, 50, 16, 32)
    cache = torch.full((shape.num_blocks, 3, 16, 64), float("nan")).bfloat16()
    counts = (20, 50, 0)
    books = [[_codebook(9, count, 32) for count in counts] for _ in range(2)]
    positions = [torch.randperm(90)[:count] for count in counts]
    pack_region(cache, torch.arange(shape.num_blocks), shape, *books, positions)
    content = unpack_region(cache, torch.arange(shape.num_blocks), shape)
    for head, count in enumerate(counts):
        assert sorted(content.positions[head, :count].tolist()) == sorted(positions[head].tolist())
        assert (content.positions[head, count:] < 0).all()
        order = content.positions[head, :count].argsort()
        keys = content.key_entries[head].float()[content.key_codes[head, :count]]
        keys *= content.key_norms[head, :count, None].float()
        assert torch.equal(keys[order], reconstruct(books[0][head])[positions[head].argsort()])


def test_positions_turn_the_right_keys() -> None:
    """Identical vectors at distinct positions stay distinct keys after the trip."""
    shape = RegionShape(1, 1, 20, 16, 32)
    vector = torch.randn(1, 32).expand(20, -1)
    book = greedy_cover(vector, 0.98)
    cache = torch.zeros(shape.num_blocks, 1, 16, 64).bfloat16()
    positions = torch.randperm(100)[:20].unsqueeze(0)
    pack_region(cache, torch.arange(shape.num_blocks), shape, [book], [book], positions)
    content = unpack_region(cache, torch.arange(shape.num_blocks), shape)
    table = torch.randn(100, 32)
    keys = content.key_entries[0].float()[content.key_codes[0]]
    keys = keys * content.key_norms[0].float().unsqueeze(-1)
    got = rotate_keys(keys, content.positions[0].long(), table)
    expected = rotate_keys(vector, content.positions[0].long(), table)
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.05)


def test_capacity_is_what_fits() -> None:
    """``entry_capacity`` entries fill the region to the last row; one more needs another block."""
    for num_blocks, block_size, head_size, num_tokens in ((3, 16, 64, 100), (42, 32, 128, 4096)):
        entries = entry_capacity(num_blocks, block_size, head_size, num_tokens)
        shape = RegionShape(entries // 2, entries - entries // 2, num_tokens, block_size, head_size)
        assert shape.num_blocks == num_blocks
        assert shape.num_rows == 2 * block_size * num_blocks
        larger = RegionShape(
            entries // 2, entries - entries // 2 + 1, num_tokens, block_size, head_size
        )
        assert larger.num_blocks == num_blocks + 1
        padding_rows = sum(array_rows(num_tokens, head_size)) * 2 * head_size - 12 * num_tokens
        assert shape.padding_bytes(num_blocks) == padding_rows


def test_every_element_is_a_number() -> None:
    """Freed blocks are read by vLLM's kernels: codes, norms and positions are finite bfloat16."""
    shape = RegionShape(MAX_ENTRIES, MAX_ENTRIES, 400, 32, 32)
    cache = torch.zeros(shape.num_blocks, 1, 32, 64).bfloat16()
    book = _codebook(MAX_ENTRIES, 390, 32)
    book.codes[:] = MAX_ENTRIES - 1 - torch.arange(390)
    book.norms[:] = 1e9
    positions = torch.cat([torch.arange(32500, 32840), torch.arange(50) + (1 << 27)])
    pack_region(cache, torch.arange(len(cache)), shape, [book], [book], [positions])
    assert torch.isfinite(cache).all() and torch.isfinite(cache.view(torch.float16)).all()
    content = unpack_region(cache, torch.arange(len(cache)), shape)
    assert sorted(content.positions[0, :390].tolist()) == positions.tolist()
    assert content.value_codes[0, :390].max() == MAX_ENTRIES - 1


def test_refusals() -> None:
    """What does not fit is refused by name."""
    with pytest.raises(ValueError, match="num_key_entries"):
        RegionShape(0, 1, 5, 16, 32)
    with pytest.raises(ValueError, match="num_value_entries"):
        RegionShape(1, MAX_ENTRIES + 1, 5, 16, 32)
    shape = RegionShape(2, 2, 10, 16, 32)
    cache = torch.zeros(4, 1, 16, 64).bfloat16()
    book, positions = _codebook(2, 10, 32), torch.arange(10).unsqueeze(0)
    with pytest.raises(ValueError, match="blocks"):
        pack_region(cache, torch.arange(0), shape, [book], [book], positions)
    with pytest.raises(ValueError, match="does not fit 10 tokens"):
        pack_region(cache, torch.arange(1), shape, [_codebook(3, 10, 32)], [book], positions)
    with pytest.raises(ValueError, match="does not fit 9 tokens"):
        pack_region(cache, torch.arange(1), shape, [book], [book], positions[:, :9])
    longer = _codebook(2, 11, 32)
    with pytest.raises(ValueError, match="11 tokens do not fit"):
        pack_region(cache, torch.arange(1), shape, [longer], [longer], [torch.arange(11)])
