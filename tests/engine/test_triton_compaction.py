"""The GPU's compaction kernels, run by Triton's interpreter, against reading, gathering, writing.

The interpreter is chosen when triton is imported, for the whole process: a child it is, one for
all cases. Shapes: K kv heads, T tokens, R blocks of the region, n tokens per block, D head size.
Unused slots and blocks hold NaN: whoever moves one shows it.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_child import in_child

pytestmark = pytest.mark.engine


@dataclass(frozen=True)
class Case:
    """One prompt; the region is its blocks ``[first, stop)``."""

    num_tokens: int
    first: int
    stop: int
    dtype: torch.dtype = torch.bfloat16
    num_heads: int = 2
    block_size: int = 16
    head_size: int = 32
    slots_outermost: bool = False
    by_head: tuple[int, ...] = ()  # pages of each kv head; () for as many for all
    num_copies: int = 1


CASES = {
    "one block": Case(40, 1, 2),
    "nearly all": Case(100, 0, 6),
    "ragged": Case(77, 1, 4),
    "slots outermost": Case(130, 3, 7, slots_outermost=True),
    "one head": Case(90, 2, 5, num_heads=1),
    "blocks of 32": Case(150, 1, 4, block_size=32, head_size=64, num_heads=3),
    "blocks of 48": Case(150, 1, 3, block_size=48, dtype=torch.float16),
    "float32": Case(90, 2, 5, dtype=torch.float32),
    "head size 96": Case(90, 2, 5, head_size=96),
    "head size 256": Case(70, 2, 4, head_size=256, slots_outermost=True),
    "by head": Case(130, 2, 6, num_heads=3, by_head=(7, 0, 5)),
    "by head, slots outermost": Case(130, 2, 6, by_head=(3, 5), slots_outermost=True),
    "copies": Case(130, 2, 6, num_copies=4),
}


def moved(case: Case, device: str = "cpu") -> bool:
    """Whether kernels and torch leave the same bits in the whole cache, and moved some."""
    from vllm_spindle.engine.cache_layout import CacheLayout
    from vllm_spindle.engine.head_table import pages
    from vllm_spindle.engine.prompt_tokens import PagedTokens, ReducedLayer, TensorTokens

    torch.manual_seed(case.num_tokens)
    heads, n, d = case.num_heads, case.block_size, case.head_size
    num_blocks = -(-case.num_tokens // n)
    shape = (num_blocks + 3, n, heads) if case.slots_outermost else (num_blocks + 3, heads, n)
    cache = torch.full((*shape, 2 * d), torch.nan).to(case.dtype)
    cache = cache.transpose(1, 2) if case.slots_outermost else cache
    blocks = torch.randperm(num_blocks + 3)[:num_blocks]
    slots = torch.arange(case.num_tokens)
    tokens = torch.randn(case.num_tokens, heads, 2 * d).to(case.dtype)
    cache[blocks[slots // n], :, slots % n] = tokens
    region = blocks[case.first : case.stop]

    # The region overlaps with what is kept, which is from anywhere in the prompt.
    def chosen(count: int) -> Tensor:
        return torch.randperm(case.num_tokens)[:count].sort().values

    num_kept = len(region) * n
    kept: Any = [chosen(num_kept) for _ in range(heads)]
    if case.by_head:
        kept = [chosen(count * n) for count in case.by_head]
    elif case.num_copies > 1:
        own = [[chosen(num_kept // case.num_copies) for _ in range(case.num_copies)] for _ in kept]
        kept = torch.stack([torch.stack(each) for each in own])
    else:
        kept = torch.stack(kept)

    def write(keys: Tensor, values: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        rows = torch.cat([keys, values], dim=-1)
        kv_cache[slot_mapping // n, :, slot_mapping % n] = rows

    layout = CacheLayout.of(*torch.arange(n * 2 * d).view(n, 2, d).unbind(1))
    theirs = cache.clone()
    torch_layer = ReducedLayer(0, theirs, 1.0, write)
    slow = TensorTokens(torch_layer, *layout.read(theirs, blocks), case.num_tokens)
    ours = cache.clone().to(device)
    assert ours.stride() == cache.stride()
    layer = ReducedLayer(0, ours, 1.0, write)
    fast = PagedTokens(layer, layout, blocks.to(device), case.num_tokens)
    if case.by_head:
        assert sum(case.by_head) == len(region) * heads and pages(cache)[0].shape[1] == 1
        slow.keep_by_head(kept, region)
        fast.keep_by_head([each.to(device) for each in kept], region.to(device))
    else:
        slow.keep(kept, region)
        fast.keep(kept.to(device), region.to(device))
    bits = {2: torch.int16, 4: torch.int32}[cache.element_size()]
    same = [torch.equal(each.cpu().view(bits), theirs.view(bits)) for each in (ours, cache)]
    return same == [True, False] and not bool(theirs[region].isnan().any())


def refusals() -> list[str]:
    """Messages about positions and heads that do not fit, and axes that are not contiguous."""
    from vllm_spindle.kernels.device_compaction import compact

    cache, blocks = torch.zeros(4, 2, 16, 64), torch.arange(4)
    positions, region = torch.zeros(2, 2, 16, dtype=torch.int64), torch.tensor([1, 2])
    attempts: list[tuple[tuple[Tensor, ...], Tensor | None]] = [
        ((cache, blocks, positions[:1], region), None),
        ((cache, blocks, positions, region), torch.zeros(2, 3, dtype=torch.int32)),
        ((cache.mT.contiguous().mT, blocks, positions, region), None),
    ]
    messages = []
    for attempt, heads in attempts:
        with pytest.raises(ValueError) as refusal:
            compact(*attempt, heads=heads)
        messages.append(str(refusal.value))
    return messages


def interpret(device: str = "cpu") -> dict[str, Any]:
    """Everything that the tests look at, in the child."""
    torch.set_num_threads(1)
    return {name: moved(case, device) for name, case in CASES.items()} | {"refusals": refusals()}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What the interpreter found."""
    return in_child(interpret, env={"TRITON_INTERPRET": "1"}, imports_vllm_itself=True)


@pytest.mark.parametrize("name", CASES)
def test_kernels_move_what_torch_moves(interpreted: dict[str, Any], name: str) -> None:
    """The whole cache has the same bits after both, wherever region and kept tokens overlap."""
    assert interpreted[name]


def test_what_does_not_fit_is_refused_by_value(interpreted: dict[str, Any]) -> None:
    """Each refusal names what it got."""
    named = ["(1, 2, 16)", "heads (2, 3)", "contiguous"]
    for part, message in zip(named, interpreted["refusals"], strict=True):
        assert part in message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_the_device_move_what_torch_moves() -> None:
    """The same cases on the GPU."""
    found = in_child(interpret, device="cuda")
    assert all(found[name] for name in CASES)
