"""Kv heads with pages of their own: which page every column of the kernel's table reads."""

from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine


def walk(num_heads: int, head_outermost: bool) -> dict[str, Any]:
    """Follow every row of a table to the tokens that it reads."""
    import torch
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_spindle.core.budget import BandPlan
    from vllm_spindle.engine.head_table import HeadTable, pages
    from vllm_spindle.engine.step import HeadRows

    num_blocks, block_size = 40, 4
    shape = (num_blocks, num_heads, block_size, 2)
    if head_outermost:
        cache = torch.zeros(shape)
    else:
        cache = torch.zeros(num_blocks, block_size, num_heads, 2).transpose(1, 2)
    for block in range(num_blocks):
        for head in range(num_heads):
            cache[block, head] = block * 100 + head
    plan = BandPlan(first_block=5, tail_block=8, prompt_blocks=9, prefix_blocks=1)
    counts = {2: [(5, 1), (2, 4)], 3: [(6, 1, 2), (3, 3, 3)]}[num_heads]
    view, apart = pages(cache)
    rows = HeadRows.of([plan, None], lambda plan: counts, apart)
    table = torch.stack([torch.arange(10, 22), torch.arange(24, 36)]).int()
    common = CommonAttentionMetadata(
        query_start_loc=torch.tensor([0, 1, 3], dtype=torch.int32),
        query_start_loc_cpu=torch.tensor([0, 1, 3], dtype=torch.int32),
        seq_lens=torch.tensor([38, 14], dtype=torch.int32),
        num_reqs=2,
        num_actual_tokens=3,
        max_query_len=2,
        max_seq_len=38,
        block_table_tensor=table,
        slot_mapping=torch.zeros(3, dtype=torch.int64),
        causal=True,
    )
    found = []
    for layer in range(2):
        split = HeadTable(layer, num_heads, block_size).split(common, rows)
        lengths = split.seq_lens.tolist()
        held = [-(-length // block_size) for length in lengths]
        read = [
            [int(view[page, 0, 0, 0]) for page in line[:count].tolist()]
            for line, count in zip(split.block_table_tensor, held, strict=True)
        ]
        found.append({"lengths": lengths, "read": read, "starts": split.query_start_loc.tolist()})
    return {"layers": found, "num_reqs": split.num_reqs, "num_tokens": split.num_actual_tokens}


@pytest.mark.parametrize("head_outermost", [True, False])
@pytest.mark.parametrize("num_heads", [2, 3])
def test_pages_of_the_region_are_dealt_out_once(num_heads: int, head_outermost: bool) -> None:
    """Each head reads its prefix, its share of the region and its tail; a whole row its blocks."""
    found = in_child(walk, num_heads=num_heads, head_outermost=head_outermost)
    counts = {2: [(5, 1), (2, 4)], 3: [(6, 1, 2), (3, 3, 3)]}[num_heads]
    region = [block * 100 + head for block in (15, 16, 17) for head in range(num_heads)]
    assert found["num_reqs"] == 2 * num_heads and found["num_tokens"] == 3 * num_heads
    for layer, own in zip(found["layers"], counts, strict=True):
        first = 0
        for head, count in enumerate(own):
            pages = region[first : first + count]
            first += count
            tail = [1800 + head, 1900 + head]  # of 38 tokens, blocks 8 and 9
            assert layer["read"][2 * head] == [1000 + head, *pages, *tail]
            assert layer["lengths"][2 * head] == 38 - (8 - 1 - count) * 4
            assert layer["read"][2 * head + 1] == [block * 100 + head for block in range(24, 28)]
            assert layer["lengths"][2 * head + 1] == 14
        starts = [part + 3 * head for head in range(num_heads) for part in (0, 1)]
        assert layer["starts"] == [*starts, 3 * num_heads]
