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
from vllm_spindle.core.admission import Admitted, admit
from vllm_spindle.kernels.cover import CompiledBook, admit_layer

THRESHOLDS = (0.98, 0.95)
SPREADS = (0.12, 0.2)  # of a cluster of keys, of values: as far apart as the thresholds allow


def run_build(options: KernelOptions, repeats: int = 5) -> dict[str, Any]:
    """Build the codebooks of one layer, keys and values, as often as told.

    The vectors are clusters of unequal sizes, about as many as entries fit. Quality is compared
    with the full greedy cover on the first head, where that takes seconds: all tokens at once, by
    degree alone.

    Returns:
        JSON-ready: wall and processor seconds for keys and values together; tokens that found a
        place, entries and mean similarities, beside the full cover's, and the differences in
        percentage points (below zero: worse than the full cover).
    """
    torch.set_num_threads(options.num_threads)
    entries = max(1, int(options.num_tokens * options.entries_ratio))
    capacity = (entries, entries, options.num_tokens)
    keys, values = (
        _clusters(options, entries, spread, options.seed + i) for i, spread in enumerate(SPREADS)
    )
    generator = torch.Generator().manual_seed(options.seed)
    ranked = torch.rand(keys.shape[:2], generator=generator).argsort(dim=-1)
    wall, processor = [], []
    heads: list[Admitted] = []
    for repeat in range(repeats + 1):  # the first compiles
        started, started_cpu = time.perf_counter(), time.thread_time()
        heads = admit_layer(keys, values, ranked, THRESHOLDS, capacity)
        if repeat:
            wall.append(time.perf_counter() - started)
            processor.append(time.thread_time() - started_cpu)
    full = admit(
        keys[0], values[0], ranked[0], THRESHOLDS, capacity, CompiledBook, chunk=len(ranked[0])
    )
    quality = {
        "by rank": _quality(heads[0], options.num_tokens),
        "full cover": _quality(full, options.num_tokens),
    }
    return {
        "settings": asdict(options),
        "capacity": entries,
        "wall_s": {"median": median(wall), "min": min(wall)},
        "processor_s": {"median": median(processor), "min": min(processor)},
        "quality": quality,
        "points_of_full": {
            name: 100 * (quality["by rank"][name] - quality["full cover"][name])
            for name in ("tokens_share", "key_similarity", "value_similarity")
        },
    }


def _quality(head: Admitted, num_tokens: int) -> dict[str, float]:
    return {
        "tokens": len(head.tokens),
        "tokens_share": len(head.tokens) / num_tokens,
        "key_entries": len(head.keys.entries),
        "value_entries": len(head.values.entries),
        "key_similarity": float(head.keys.similarity.mean()),
        "value_similarity": float(head.values.similarity.mean()),
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
