"""``bench capacity``: how many requests run in the same KV memory, stock against plugin.

Both sides are fresh child processes with the same flags and requests, one after the other, the
order swapped each repeat: a shared machine that slows down hits both.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from vllm_spindle.bench.provenance import provenance

SIDES = ("stock", "spindle")
RATIOS = ("peak_running", "decode_tokens_per_second", "output_tokens_per_second")


@dataclass(frozen=True)
class CapacityOptions:
    """What to run. ``engine`` holds the arguments of ``LLM`` that both sides share."""

    engine: dict[str, Any]
    spindle: dict[str, Any]
    num_requests: int
    prompt_len: int
    output_len: int
    repeats: int
    num_threads: int
    seed: int = 0


def run_capacity(
    options: CapacityOptions, on_progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Run both sides ``repeats`` times.

    Args:
        options: the settings.
        on_progress: called with side, repeat and requests finished.

    Returns:
        A JSON-ready report: settings, provenance, per side every run and the medians, ratios.

    Raises:
        RuntimeError: if a side fails, with the end of its log.
    """
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for repeat in range(options.repeats):
        for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
            report = lambda done, side=side, repeat=repeat: on_progress(side, repeat, done)  # noqa: E731
            runs[side].append(summarise(_run_side(side, options, report)))
    medians = {side: _medians(runs[side]) for side in SIDES}
    return {
        "benchmark": "capacity",
        "settings": {
            "engine": options.engine,
            "spindle": options.spindle,
            "num_requests": options.num_requests,
            "prompt_len": options.prompt_len,
            "output_len": options.output_len,
            "repeats": options.repeats,
            "num_threads": options.num_threads,
            "seed": options.seed,
        },
        "provenance": provenance(),
        "runs": runs,
        "medians": medians,
        "ratios": {
            name: medians["spindle"][name] / medians["stock"][name]
            for name in RATIOS
            if medians["stock"][name]
        },
    }


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """A run's raw counts with the rates that follow from them."""
    batches, codebooks = result.pop("decode_batches"), result.pop("codebooks")
    vectors = codebooks.get("vectors", 0)
    prefill = result["prefill_seconds"]
    return {
        **result,
        "decode_tokens_per_second": _rate(result["decode_tokens"], result["decode_seconds"]),
        "output_tokens_per_second": _rate(result["output_tokens"], result["total_seconds"]),
        "reduction_share_of_prefill": _rate(
            result["reduction_seconds"], prefill - result["reduction_seconds"]
        ),
        "mean_decode_batch": _rate(sum(batches), len(batches)),
        "merged_vectors": vectors,
        "codebook_fill": _rate(codebooks.get("entries", 0), codebooks.get("capacity", 0)),
        "codebook_overflow": _rate(
            codebooks.get("overflow", 0), vectors + codebooks.get("overflow", 0)
        ),
        "codebook_similarity": _rate(codebooks.get("similarity_sum", 0), vectors),
    }


def _rate(amount: float, base: float) -> float:
    return amount / base if base else 0.0


def _medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {name: median(run[name] for run in runs) for name in runs[0]}


def _run_side(
    side: str, options: CapacityOptions, on_finished: Callable[[int], None]
) -> dict[str, Any]:
    engine = dict(options.engine)
    if side == "spindle":
        engine["additional_config"] = {"spindle": options.spindle}
    payload = {
        "engine": engine,
        "num_requests": options.num_requests,
        "prompt_len": options.prompt_len,
        "output_len": options.output_len,
        "seed": options.seed,
    }
    child = subprocess.Popen(
        [sys.executable, "-m", "vllm_spindle.bench.capacity_run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            "VLLM_LOGGING_LEVEL": "WARNING",
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": str(options.num_threads),
        },
    )
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(json.dumps(payload))
    child.stdin.close()
    log: list[str] = []
    result = None
    for line in child.stdout:
        word, _, rest = line.partition(" ")
        if word == "progress":
            on_finished(int(rest))
        elif word == "result":
            result = json.loads(rest)
        else:
            log = [*log[-30:], line]
    if child.wait() != 0 or result is None:
        raise RuntimeError(f"the {side} side failed:\n{''.join(log)}")
    return result
