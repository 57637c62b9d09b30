"""``bench gpu``'s kernels: decode attention of one layer over full, evicted and codebook rows.

Run as ``python -m vllm_spindle.bench.gpu_kernel`` with the options as JSON on standard input.
FlashAttention is called as vLLM's backend calls it, over the full context and over the share that
eviction leaves; the Triton kernel over codebooks of the same bytes. Every row has blocks of its
own, so that no cache holds another's. Errors are against float32 torch over the same region.

Shapes: B rows, K kv heads, G query heads per kv head, N context tokens, D head size.
"""

import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from vllm_spindle.config import SpindleConfig
from vllm_spindle.core.budget import BandPlan
from vllm_spindle.core.codebook import Codebook
from vllm_spindle.core.reference import attend_codebook
from vllm_spindle.engine.codebook_shape import codebook_shape
from vllm_spindle.kernels.decode_rows import DeviceRows
from vllm_spindle.kernels.device_decode import DeviceRegionDecoder
from vllm_spindle.kernels.region import pack_region
from vllm_spindle.kernels.region_shape import RegionShape


def codebook_rows(
    options: dict[str, Any], num_rows: int, num_tokens: int, device: str
) -> tuple[Tensor, DeviceRows, Callable[[Tensor, float], Tensor], Tensor]:
    """Cache, rows, oracle of the first row, and rotary table; a region and one tail block a row."""
    heads, d, n = options["num_kv_heads"], options["head_size"], options["block_size"]
    region_blocks = max(1, int(num_tokens // n * options["keep_ratio"]))
    plan = BandPlan(0, num_tokens // n, num_tokens // n + 1)
    plan = BandPlan(plan.tail_block - region_blocks, plan.tail_block, plan.prompt_blocks)
    shape = codebook_shape(SpindleConfig(method="both"), "both", plan, n, d)
    books, positions = _random_books(shape, heads, num_tokens)
    per_row = region_blocks + 1
    cache = torch.zeros(num_rows * per_row + 1, heads, n, 2 * d, dtype=torch.bfloat16)
    first = torch.arange(1, region_blocks + 1)
    pack_region(cache, first, shape, *books, positions)
    tail = torch.randn(heads, n, 2 * d).bfloat16()
    table = 1 + torch.arange(num_rows * per_row, dtype=torch.int32).view(num_rows, per_row)
    for row in table.long():
        cache[row[:-1]] = cache[first]
        cache[row[-1]] = tail
    angles = torch.arange(num_tokens + n).unsqueeze(1) * 5e5 ** -(torch.arange(0, d, 2) / d)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)

    def oracle(query: Tensor, scale: float) -> Tensor:
        keys, values = tail.transpose(0, 1).split(d, dim=-1)
        return attend_codebook(query, *books, positions, keys, values, cos_sin, scale=scale)

    counts = [shape.num_key_entries, shape.num_value_entries, shape.num_tokens]

    def ints(*values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    rows = DeviceRows(
        block_table=table.to(device),
        starts=ints(*[[0, region_blocks]] * num_rows),
        shapes=ints(*[counts] * num_rows),
        tail_lens=ints(*[n] * num_rows),
        query_start=torch.arange(num_rows + 1, dtype=torch.int32, device=device),
        prefix_blocks=ints(*[0] * num_rows),
        max_query_len=1,
    )
    return cache.to(device), rows, oracle, cos_sin.to(device)


def _random_books(
    shape: RegionShape, heads: int, num_tokens: int
) -> tuple[tuple[list[Codebook], list[Codebook]], list[Tensor]]:
    def book(num_entries: int) -> Codebook:
        directions = torch.nn.functional.normalize(
            torch.randn(num_entries, shape.head_size), dim=-1
        )
        return Codebook(
            directions.bfloat16().float(),
            torch.randint(0, num_entries, (shape.num_tokens,)),
            (0.5 + torch.rand(shape.num_tokens)).half().float(),
            torch.ones(shape.num_tokens),
        )

    books = tuple(
        [book(count) for _ in range(heads)]
        for count in (shape.num_key_entries, shape.num_value_entries)
    )
    positions = [torch.randperm(num_tokens)[: shape.num_tokens] for _ in range(heads)]
    return books, positions


def flash_call(query: Tensor, num_tokens: int, options: dict[str, Any]) -> Callable[[], Any]:
    """FlashAttention over dense rows, as vLLM's backend calls it."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    num_rows, _, d = query.shape
    n, heads = options["block_size"], options["num_kv_heads"]
    per_row = -(-num_tokens // n)
    there = {"device": query.device}
    cache = torch.randn(num_rows * per_row, heads, n, 2 * d, dtype=torch.bfloat16, **there)
    keys, values = cache.transpose(1, 2).split(d, dim=-1)
    lengths = torch.full((num_rows,), num_tokens, dtype=torch.int32, **there)
    starts = torch.arange(num_rows + 1, dtype=torch.int32, **there)
    table = torch.randperm(num_rows * per_row, **there).int().view(num_rows, per_row)
    output = torch.empty_like(query)
    version = get_flash_attn_version(head_size=d)
    return lambda: flash_attn_varlen_func(
        q=query,
        k=keys,
        v=values,
        out=output,
        cu_seqlens_q=starts,
        max_seqlen_q=1,
        seqused_k=lengths,
        max_seqlen_k=num_tokens,
        softmax_scale=d**-0.5,
        causal=True,
        block_table=table,
        fa_version=version,
    )


def seconds_of(call: Callable[[], Any], repeats: int, device: str) -> float:
    """Median of a call, by events on the device."""
    call()  # compiles
    times = []
    for _ in range(repeats):
        if device == "cpu":
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return median(times)


def run(options: dict[str, Any]) -> None:
    """One result per context and batch size, printed with those before it as they come."""
    torch.manual_seed(options["seed"])
    results = []
    for num_tokens in options["contexts"]:
        for num_rows in options["batches"]:
            results.append(_measured(options, num_tokens, num_rows))
            print("result " + json.dumps({"kernels": results}), flush=True)


def _measured(options: dict[str, Any], num_tokens: int, num_rows: int) -> dict[str, Any]:
    device, repeats, d = options["device"], options["repeats"], options["head_size"]
    num_heads = options["num_kv_heads"] * options["group"]
    query = torch.randn(num_rows, num_heads, d).bfloat16().to(device)
    seconds, error = _codebooks(options, query, num_tokens)
    result = {"context": num_tokens, "batch": num_rows}
    result |= {"codebook_seconds": seconds, "codebook_error": error}
    if device != "cpu":
        kept = max(1, int(num_tokens * options["keep_ratio"]))
        for name, length in (("full_seconds", num_tokens), ("evict_seconds", kept)):
            result[name] = seconds_of(flash_call(query, length, options), repeats, device)
    return result


def _codebooks(options: dict[str, Any], query: Tensor, num_tokens: int) -> tuple[float, float]:
    """Seconds, and the first row's largest error relative to its largest output."""
    device, scale = options["device"], options["head_size"] ** -0.5
    cache, rows, oracle, cos_sin = codebook_rows(options, len(query), num_tokens, device)
    decoder, output = DeviceRegionDecoder(cos_sin, scale), torch.empty_like(query)
    seconds = seconds_of(lambda: decoder(query, output, cache, rows), options["repeats"], device)
    expected = oracle(query[:1].cpu(), scale)
    off = (output[:1].cpu().float() - expected).abs().max()
    return seconds, float(off / expected.abs().max())


def main() -> None:
    """Read the options, run."""
    run(json.load(sys.stdin))


if __name__ == "__main__":
    main()
