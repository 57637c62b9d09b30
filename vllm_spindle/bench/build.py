"""``bench kernel``'s second half: time and quality of building one layer's codebooks.

Shapes: K kv heads, N tokens, D head size.
"""

import time
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from torch import Tensor

from vllm_spindle.bench.kernel import KernelOptions
from vllm_spindle.core.codebook import greedy_cover
from vllm_spindle.kernels.numba_cover import cover_layer

# Name, threshold, spread of a cluster: as far apart as the thresholds allow.
SIDES = (("keys", 0.98, 0.12), ("values", 0.95, 0.2))


def run_build(options: KernelOptions, repeats: int = 5) -> dict[str, Any]:
    """Build the codebooks of one layer, keys and values, as often as told.

    The vectors are clusters of unequal sizes, about as many as entries fit. Quality is compared
    with the full greedy cover on the first head, where that takes seconds.

    Returns:
        JSON-ready: wall and processor seconds for keys and values together, and per side entries
        used, overflow and mean similarity, beside the full cover's.
    """
    torch.set_num_threads(options.num_threads)
    capacity = max(1, int(options.num_tokens * options.entries_ratio))
    data = {
        name: _clusters(options, capacity, spread, options.seed + i)
        for i, (name, _, spread) in enumerate(SIDES)
    }
    wall, processor = [], []
    for repeat in range(repeats + 1):  # the first compiles
        started, started_cpu = time.perf_counter(), time.thread_time()
        books = {name: cover_layer(data[name], limit, capacity) for name, limit, _ in SIDES}
        if repeat:
            wall.append(time.perf_counter() - started)
            processor.append(time.thread_time() - started_cpu)
    quality = {}
    for name, threshold, _ in SIDES:
        own, full = books[name][0], greedy_cover(data[name][0], threshold, capacity)
        quality[name] = {
            side: {
                "entries": len(book.entries),
                "overflow": book.num_overflow,
                "mean_similarity": float(book.similarity.mean()),
            }
            for side, book in (("windowed", own), ("full", full))
        }
    return {
        "settings": asdict(options),
        "capacity": capacity,
        "wall_s": {"median": median(wall), "min": min(wall)},
        "processor_s": {"median": median(processor), "min": min(processor)},
        "quality": quality,
    }


def _clusters(options: KernelOptions, num_clusters: int, spread: float, seed: int) -> Tensor:
    """[K, N, D], float32."""
    generator = torch.Generator().manual_seed(seed)
    shape = (options.num_kv_heads, options.num_tokens)
    centres = torch.randn(num_clusters, options.head_size, generator=generator)
    popularity = torch.arange(1, num_clusters + 1).float() ** -0.8
    which = torch.multinomial(popularity, shape[0] * shape[1], True, generator=generator)
    noise = torch.randn(*shape, options.head_size, generator=generator)
    noise = noise * spread * torch.rand(*shape, 1, generator=generator)
    lengths = 0.5 + torch.rand(*shape, 1, generator=generator)
    return (centres[which].view(*shape, -1) + noise) * lengths
