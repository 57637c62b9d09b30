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
    rows = HeadRows.of([plan, None], lambda plan: counts)
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
        split = HeadTable(layer, num_heads, block_size).split(common, rows, apart)
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


def compare(num_heads: int, with_kernel: bool) -> dict[str, Any]:
    """A table shared by two layers beside one of each layer's own, in a padded batch."""
    from unittest.mock import patch

    import torch
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_spindle.core.budget import BandPlan
    from vllm_spindle.engine.head_table import HeadTable
    from vllm_spindle.engine.shared_head_table import SharedHeadTable
    from vllm_spindle.engine.step import HeadRows

    def batch(query_lens: list[int], lengths: list[int], tokens: int) -> Any:
        """Rows without tokens are padding, and so are more tokens than they have."""
        starts = torch.tensor([0, *query_lens]).cumsum(0).int()
        rows = torch.tensor(lengths).unsqueeze(1) > 0
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            num_reqs=len(lengths),
            num_actual_tokens=tokens,
            max_query_len=max(query_lens),
            max_seq_len=48,
            block_table_tensor=torch.arange(12 * len(lengths)).view(-1, 12).int() * rows,
            slot_mapping=torch.zeros(tokens, dtype=torch.int64),
        )

    plan = BandPlan(first_block=5, tail_block=8, prompt_blocks=9, prefix_blocks=1)
    counts = {1: [(2,), (3,)], 3: [(6, 1, 2), (3, 3, 3)]}[num_heads]
    before, now = (HeadRows.of(plans, lambda _: counts) for plans in ([plan] * 4, [plan, None]))
    apart, size = num_heads, (2, num_heads, 4, 5)
    shared = SharedHeadTable(*size, torch.device("cpu"), with_kernel=with_kernel)
    if with_kernel:
        from vllm_spindle.kernels import device_head_pages

        patch.object(device_head_pages, "TILE", 4).start()
    for layer in range(2):  # a step of more rows, before
        full = batch([1] * 4, [38] * 4, 4)
        shared.batch(full, before, apart, with_rest=True).fill(layer)
    found: dict[str, Any] = {"differ": 0, "rows": []}
    for with_rest, query_lens, tokens in ((True, [1, 3, 0], 7), (False, [1, 1, 0], 3)):
        own = batch(query_lens[:2], [38, 14], sum(query_lens))
        padded = batch(query_lens, [38, 14, 0], tokens)
        mine = shared.batch(padded, now, apart, with_rest=with_rest)
        for layer in range(2):
            mine.fill(layer)
            split = HeadTable(layer, num_heads, 4).split(own, now, apart)
            pages = mine.split.block_table_tensor.view(num_heads, 3 + with_rest, -1)
            lengths = mine.split.seq_lens.view(num_heads, -1)
            found["differ"] += int((lengths[:, :2] != split.seq_lens.view(-1, 2)).sum())
            columns = torch.arange(12) < (split.seq_lens.view(-1, 2, 1) + 3) // 4
            differs = pages[:, :2] != split.block_table_tensor.view(-1, 2, 12)
            found["differ"] += int((differs & columns).sum())
            found["rows"].append([lengths[:, 2:].tolist(), int(pages[:, 3:].sum())])
        starts = mine.split.query_start_loc
        assert starts.equal(mine.split.query_start_loc_cpu)
        assert mine.split.num_actual_tokens == starts[-1]
        found[f"starts {with_rest}"] = starts.tolist()
    return found


@pytest.mark.parametrize("with_kernel", [False, True])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_a_shared_table_is_each_layers_own_in_turn(num_heads: int, with_kernel: bool) -> None:
    """Whatever was there before; padding is in no row of a head's tokens, and no length is 0.

    By torch, and by the kernel for GPUs, interpreted.
    """
    env = {"TRITON_INTERPRET": "1"} if with_kernel else {}
    options = {"num_heads": num_heads, "with_kernel": with_kernel}
    found = in_child(compare, env=env, imports_vllm_itself=with_kernel, **options)
    assert found["differ"] == 0
    with_rest, without = [[1, 3]] * num_heads, [[1]] * num_heads
    assert found["rows"] == [[with_rest, 0]] * 2 + [[without, 0]] * 2
    heads = range(num_heads)
    starts = [7 * head + start for head in heads for start in (0, 1, 4, 4)]
    assert found["starts True"] == [*starts, 7 * num_heads]
    assert found["starts False"] == list(range(3 * num_heads + 1))
