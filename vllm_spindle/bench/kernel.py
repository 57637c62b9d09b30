"""``bench kernel``: decode attention over a codebook band, against vLLM's over the full cache.

Both sides attend to the same tokens, in one process, taking turns after a round of all layers: a
shared machine that slows down hits both. Several layers are cycled, as in a model, so that neither
side finds its tokens in a small cache; then one layer alone as often (hot), where they may.

Shapes: K kv heads, G query heads per kv head, H = K * G, N tokens, D head size, n block size.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from vllm_spindle.bench.provenance import provenance
from vllm_spindle.core.codebook import Codebook, reconstruct
from vllm_spindle.core.reference import attend_codebook, attend_reduced
from vllm_spindle.core.rotary import rotate_keys
from vllm_spindle.kernels.decode import DecodeRows, RegionDecoder
from vllm_spindle.kernels.region import pack_region
from vllm_spindle.kernels.region_shape import RegionShape

STOCK_BLOCK_SIZES = (32, 128)  # vLLM's smallest and its default on the CPU


@dataclass(frozen=True)
class KernelOptions:
    """What to measure. ``entries_ratio``: entries of keys, and of values, per token."""

    num_tokens: int = 4096
    num_kv_heads: int = 8
    group: int = 4
    head_size: int = 128
    entries_ratio: float = 0.3
    block_size: int = 32
    num_layers: int = 8
    repeats: int = 20
    num_threads: int = 1
    seed: int = 0


@dataclass(frozen=True)
class _Side:
    """One way to attend: per layer a call, and its largest error against float32 torch."""

    calls: list[Callable[[], None]]
    output: Tensor
    expected: Tensor

    def errors(self) -> dict[str, float]:
        self.calls[0]()
        off = self.output.float() - self.expected
        return {"max_error": float(off.abs().max()), "rms_error": float(off.square().mean().sqrt())}


def run_kernel(options: KernelOptions, on_progress: Callable[[int], None]) -> dict[str, Any]:
    """Measure.

    Args:
        options: the settings.
        on_progress: called with the repeats done.

    Returns:
        A JSON-ready report: per side its errors; for "cycling" and "hot" seconds per layer and side
        (median and min) and ``ratios`` of spindle over the better stock block size, "paired" being
        the median of those of the same layer in the same round.
    """
    torch.set_num_threads(options.num_threads)
    torch.manual_seed(options.seed)
    layers = [_Layer.random(options) for _ in range(options.num_layers)]
    query = torch.randn(1, options.num_kv_heads * options.group, options.head_size).bfloat16()
    sides = {f"stock_{size}": _stock_side(layers, query, size) for size in STOCK_BLOCK_SIZES}
    sides["spindle"] = _spindle_side(layers, query, options)
    errors = {name: side.errors() for name, side in sides.items()}  # the first call compiles
    calls = {name: side.calls for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(options.repeats):
        _time_round(calls, seconds)
        on_progress(repeat + 1)
    hot_calls = {name: side.calls[:1] * options.num_layers for name, side in sides.items()}
    hot: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        _time_round(hot_calls, hot)
    return {
        "benchmark": "kernel",
        "settings": asdict(options),
        "provenance": provenance(),
        "errors": errors,
        "cycling": _compared(seconds),
        "hot": _compared(hot),
    }


def _time_round(
    calls: dict[str, list[Callable[[], None]]], seconds: dict[str, list[float]]
) -> None:
    for name, of_side in calls.items():
        for call in of_side:
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)


def _compared(seconds: dict[str, list[float]]) -> dict[str, Any]:
    results = {
        name: {"median_s": median(times), "min_s": min(times)} for name, times in seconds.items()
    }
    best = min((name for name in results if name != "spindle"), key=lambda n: results[n]["min_s"])
    pairs = zip(seconds["spindle"], seconds[best], strict=True)
    return {
        "best_stock": best,
        "results": results,
        "ratios": {
            "median": results["spindle"]["median_s"] / results[best]["median_s"],
            "min": results["spindle"]["min_s"] / results[best]["min_s"],
            "paired": median(ours / stock for ours, stock in pairs),
        },
    }


@dataclass(frozen=True)
class _Layer:
    """One layer's codebooks, and the tokens that they stand for.

    Attributes:
        books: per kv head, of keys and of values.
        keys: rotated at positions 0 to N - 1. [N, K, D], bf16.
        values: [N, K, D], bf16.
        cos_sin: rotary table. [N + 1, D], bf16.
    """

    books: tuple[list[Codebook], list[Codebook]]
    keys: Tensor
    values: Tensor
    cos_sin: Tensor

    @classmethod
    def random(cls, options: KernelOptions) -> "_Layer":
        num_entries = max(1, int(options.num_tokens * options.entries_ratio))
        books = tuple(
            [
                _random_codebook(num_entries, options.num_tokens, options.head_size)
                for _ in range(options.num_kv_heads)
            ]
            for _ in range(2)
        )
        positions = torch.arange(options.num_tokens + 1)
        turns = 1e4 ** -(torch.arange(0, options.head_size, 2) / options.head_size)
        angles = positions.unsqueeze(1) * turns
        # As vLLM has it for a bf16 model.
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1).bfloat16()
        keys = torch.stack([reconstruct(book) for book in books[0]])  # [K, N, D]
        keys = rotate_keys(keys, positions[:-1], cos_sin).transpose(0, 1)
        values = torch.stack([reconstruct(book) for book in books[1]]).transpose(0, 1)
        return cls(books, keys.bfloat16(), values.bfloat16(), cos_sin)


def _random_codebook(num_entries: int, num_tokens: int, head_size: int) -> Codebook:
    directions = torch.nn.functional.normalize(torch.randn(num_entries, head_size), dim=-1)
    return Codebook(
        entries=directions.bfloat16().float(),
        codes=torch.randint(0, num_entries, (num_tokens,)),
        norms=((0.5 + torch.rand(num_tokens)) * head_size**0.5).half().float(),
        similarity=torch.ones(num_tokens),
    )


def _spindle_side(layers: list[_Layer], query: Tensor, options: KernelOptions) -> _Side:
    """Region of all tokens but the last, which is the dense tail: the query's own token."""
    merged = options.num_tokens - 1
    num_entries = max(1, int(options.num_tokens * options.entries_ratio))
    shape = RegionShape(num_entries, num_entries, merged, options.block_size, options.head_size)
    decoder = RegionDecoder(
        layers[0].cos_sin, options.head_size**-0.5, num_threads=options.num_threads
    )
    output = torch.empty_like(query)
    positions = torch.arange(merged).expand(options.num_kv_heads, -1)
    num_blocks = shape.num_blocks + 1
    calls, expected = [], torch.empty(0)
    for layer in layers:
        books = tuple([_without_last(book) for book in side] for side in layer.books)
        width = 2 * options.head_size
        cache = torch.zeros(num_blocks, options.num_kv_heads, options.block_size, width).bfloat16()
        blocks = torch.randperm(num_blocks)
        pack_region(cache, blocks[:-1], shape, *books, positions)
        chunk = cache[blocks[-1]].view(options.num_kv_heads, -1)
        tail_size = options.block_size * options.head_size
        chunk[:, : tail_size : options.block_size] = layer.keys[-1]
        chunk[:, tail_size : tail_size + options.head_size] = layer.values[-1]
        counts = [num_entries, num_entries, merged]
        rows = DecodeRows.of([blocks.tolist()], [[0, shape.num_blocks]], [counts], [1], [0, 1])
        calls.append(lambda cache=cache, rows=rows: decoder(query, output, cache, rows))
        if not len(expected):
            tail = (layer.keys[-1:], layer.values[-1:])
            scale = options.head_size**-0.5
            expected = attend_codebook(query, *books, positions, *tail, layer.cos_sin, scale=scale)
    return _Side(calls, output, expected)


def _without_last(book: Codebook) -> Codebook:
    return Codebook(book.entries, book.codes[:-1], book.norms[:-1], book.similarity[:-1])


def _stock_side(layers: list[_Layer], query: Tensor, block_size: int) -> _Side:
    """vLLM's own CPU kernel over the full cache, called as its backend calls it."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    num_tokens, num_kv_heads, head_size = layers[0].keys.shape
    num_heads, scale = query.shape[1], head_size**-0.5
    num_blocks = -(-num_tokens // block_size)
    isa = _get_attn_isa(torch.bfloat16, block_size, head_size)
    query_start, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [num_tokens]))
    table = torch.randperm(num_blocks, dtype=torch.int32).unsqueeze(0)
    slots = (table[0].long().unsqueeze(1) * block_size + torch.arange(block_size)).flatten()
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_size,
        seq_lens=lengths,
        dtype=torch.bfloat16,
        query_start_loc=query_start,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )
    output = torch.empty_like(query)
    calls: list[Callable[[], None]] = []
    for layer in layers:
        cache = torch.zeros(num_blocks, num_kv_heads, 2 * block_size, head_size).bfloat16()
        halves = cache.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            layer.keys.contiguous(), layer.values.contiguous(), *halves, slots[:num_tokens], isa
        )
        calls.append(
            lambda halves=halves: ops.cpu_attention_with_kv_cache(
                query=query,
                key_cache=halves[0],
                value_cache=halves[1],
                output=output,
                query_start_loc=query_start,
                seq_lens=lengths,
                scale=scale,
                causal=True,
                alibi_slopes=None,
                sliding_window=-1,
                block_table=table,
                softcap=0.0,
                scheduler_metadata=plan,
                s_aux=None,
            )
        )
    nothing = torch.empty(num_kv_heads, 0, dtype=torch.int64)
    first = layers[0]
    expected = attend_reduced(query, first.keys, first.values, nothing, num_context=0, scale=scale)
    return _Side(calls, output, expected)
