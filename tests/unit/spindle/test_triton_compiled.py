"""The reduction's GPU kernels, compiled without a GPU by way of Triton's own launch, not launched.

What the interpreter never sees: which of the arguments make Triton compile a kernel again.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton.backends.nvidia") is None,
    reason="triton is not installed, or was built without its CUDA backend",
)

CAPABILITIES = (80, 90)
# Prompt tokens, observed queries, blocks of the region and the first of them.
PROMPTS = ((100, 40, 1, 1), (1000, 288, 17, 3), (4096, 48, 2, 6))


def compiled() -> list[dict[str, list[int]]]:
    """After each prompt, kernels by name: how often each was compiled, for each capability."""
    from unittest.mock import patch

    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from vllm_spindle.core.scoring import Questions
    from vllm_spindle.kernels import (
        device_compaction,
        device_decode,
        device_head_pages,
        device_scoring,
    )
    from vllm_spindle.kernels.decode_rows import DeviceRows

    class Driver:
        """A GPU of each capability, of which nobody asks more."""

        device = 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", self.device, 32)

        def get_current_device(self) -> int:
            return self.device

        def get_current_stream(self, device: int) -> int:
            return 0

    class Compiled:
        """A kernel that is compiled for its arguments and not launched."""

        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kw: self.kernel.run(*args, grid=grid, warmup=True, **kw)

    driver.set_active(Driver())
    heads = 2
    names = ("log_sum_exps", "merge_log_sum_exps", "receive", "gather_pages", "write_pages")
    names += ("fill_head_pages", "decode_split", "merge_splits")
    modules = device_compaction, device_decode, device_head_pages, device_scoring
    kernels = {}
    for name in names:
        (module,) = [each for each in modules if hasattr(each, name)]
        kernels[name] = getattr(module, name)
        setattr(module, name, Compiled(kernels[name]))

    def reduce(num_tokens: int, num_queries: int, num_blocks: int, first: int) -> None:
        group, d, n = 4, 48, 16
        cache = torch.zeros(300, heads, n, 2 * d, dtype=torch.bfloat16)
        blocks = torch.arange(300)
        queries = torch.zeros(first + num_queries, heads, group, d, dtype=torch.bfloat16)
        queries = queries[first:].permute(1, 2, 0, 3)
        positions = torch.arange(num_queries)
        keys = device_scoring.PagedKeys(cache, blocks[first:], num_tokens)
        window = range(num_queries - 32, num_queries)
        for last_first in (None, num_queries - 1):
            keys.answer(queries, positions, 0.1, Questions(window, last_first, from_afar=True))
        kept = torch.zeros(heads, num_blocks, n, dtype=torch.int64).transpose(0, 1)
        region = blocks[first : first + num_blocks]
        device_compaction.compact(cache, blocks[first:], kept, region)
        fill(num_blocks, first)
        decode(num_blocks, first, num_blocks * 7 if first % 2 else 16)

    def decode(num_rows: int, max_query_len: int, num_tokens: int) -> None:
        """As many rows and tokens of a step, in buffers for seven more rows."""
        ints = torch.zeros(6 * (num_rows + 7), dtype=torch.int32)
        query = torch.zeros(num_tokens, heads * 4, 48, dtype=torch.bfloat16)
        rows = DeviceRows(
            block_table=torch.zeros(num_rows, num_rows * 20 - 19, dtype=torch.int32),
            starts=ints[: 2 * num_rows].view(-1, 2),
            shapes=ints[2 * num_rows + 1 :][: 3 * num_rows].view(-1, 3),
            tail_lens=ints[:num_rows],
            query_start=ints[: num_rows + 1],
            prefix_blocks=ints[5 * num_rows + first_odd(num_rows) :][:num_rows],
            max_query_len=max_query_len,
        )
        cache = torch.zeros(30, heads, 16, 96, dtype=torch.bfloat16)
        decoder = device_decode.DeviceRegionDecoder(torch.zeros(99, 48), 0.1)
        for num_splits in (1, 2 + num_rows % 3):
            decoder(query, torch.empty_like(query), cache, rows, num_splits=num_splits)

    def first_odd(number: int) -> int:
        """So that what follows is not aligned."""
        return 1 - number % 2

    def fill(num_rows: int, layer: int) -> None:
        """A table of a batch of that many rows, with padding behind each head's or without."""
        ints = torch.zeros(3 + heads * 10, 23, dtype=torch.int32)[:, :num_rows]
        pages = torch.zeros(heads, num_rows + layer % 2, 40, dtype=torch.int32)[:, :num_rows]
        held = ints[3 + heads * layer :][:heads]
        device_head_pages.fill(
            pages,
            pages[..., 0].contiguous(),
            torch.zeros(num_rows, 40, dtype=torch.int32),
            torch.zeros(num_rows, dtype=torch.int32),
            (ints[0], ints[1], ints[2]),
            held,
            block_size=16,
            pages_apart=32,
        )

    found = []
    with (
        patch.object(device_scoring.DeviceAttention, "_choose_splits", lambda *_: 3),
        # As on a device: bfloat16 goes to the tensor cores.
        patch.object(device_scoring, "INTERPRETED", ()),
    ):
        for prompt in PROMPTS:
            for Driver.device in CAPABILITIES:
                reduce(*prompt)
            found.append(
                {
                    name: [len(kernel.device_caches[each][0]) for each in CAPABILITIES]
                    for name, kernel in kernels.items()
                }
            )
    return found


def test_kernels_compile_once_whatever_the_prompt(tmp_path: Path) -> None:
    """For sm_80 and sm_90, with a padded head: the second and third prompt find them all there."""
    first, *later = in_child(compiled, env={"TRITON_CACHE_DIR": str(tmp_path)})
    once = [1, 1]
    twice = {
        "receive": [2, 2],  # without and with the last queries
        "decode_split": [2, 2],  # outputs as they shall be, and float32 to be merged
    }
    assert {name: first.pop(name) for name in twice} == twice
    assert all(count == once for count in first.values()) and len(first) == 6
    assert later == [first | twice] * 2
