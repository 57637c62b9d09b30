"""``bench gpu``: capacity, decode steps, throughput and kernels, stock against plugin.

Every side is a fresh process with the same flags, the same model of dummy weights and a KV pool of
the same stated size; it serves all contexts. The sides: ``stock``; ``off``, spindle at keep_ratio
1.0; ``evict``, at the ratio; ``whole``, the same server asked by every request to keep all. It runs
on whatever vLLM runs on: on a CPU its figures say nothing but that it works.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_spindle.bench.gpu_shapes import SHAPES, ModelShape
from vllm_spindle.bench.provenance import provenance
from vllm_spindle.config import KEEP_RATIO_KEY

SIDES = ("stock", "off", "evict", "whole")
MARGIN_TOKENS = 64  # of the longest sequence, beside prompt and output
MOST_AMPLE = 16


@dataclass(frozen=True)
class GpuOptions:
    """What to run.

    Attributes:
        shape: of ``SHAPES``.
        contexts: prompt tokens of every request, one measurement each.
        kv_cache_bytes: the pool of every side.
        keep_ratio: of ``evict``, and of the codebooks in ``kernels``.
        sides: of ``SIDES``, stock among them.
        output_len: tokens of an answer; ``bound_output_len`` where memory is short.
        bound_factor: requests there, over what stock can hold.
        engine: further arguments of ``LLM``, the same for every side.
        kernel_batches: rows of a decode step of one layer; empty to leave kernels out.
    """

    shape: str
    contexts: tuple[int, ...]
    kv_cache_bytes: int
    keep_ratio: float = 0.25
    sides: tuple[str, ...] = SIDES
    output_len: int = 64
    bound_output_len: int = 512
    bound_factor: float = 6.0
    block_size: int = 16
    repeats: int = 3
    seed: int = 0
    engine: dict[str, Any] = field(default_factory=dict)
    kernel_batches: tuple[int, ...] = (1, 8)

    @property
    def model(self) -> ModelShape:
        """The shape itself."""
        return SHAPES[self.shape]

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.contexts) + max(self.output_len, self.bound_output_len) + MARGIN_TOKENS

    def stock_capacity(self, context: int, output_len: int) -> int:
        """Requests that the pool holds whole."""
        pool_tokens = self.kv_cache_bytes // self.model.kv_bytes_per_token
        return max(1, pool_tokens // (context + output_len + self.block_size))


def run_gpu(
    options: GpuOptions,
    on_progress: Callable[[str], None],
    on_report: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Run every side, then the kernels and the reduction of a layer.

    Args:
        options: what to run.
        on_progress: called with the name of each part as it begins.
        on_report: called with the report so far as results come: a GPU may be taken away.

    Returns:
        A JSON-ready report: settings, provenance, results by side and context, ratios to stock.

    Raises:
        RuntimeError: if a child fails before its first context, with the end of its log; later,
            what it has is kept, and ``failed`` in it says why.
    """
    results: dict[str, Any] = {}
    kernels: dict[str, list[Any]] = {"kernels": [], "reductions": []}
    with tempfile.TemporaryDirectory() as folder:
        options.model.write(Path(folder), options.max_model_len)
        for side in options.sides:
            on_progress(side)

            def save(result: Any, side: str = side) -> None:
                results[side] = result
                on_report(_report(options, results, kernels))

            save(_child("gpu_run", side_payload(options, side, folder), {}, save))
    if options.kernel_batches:
        device = _device()
        environment = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
        for part, module in (("kernels", "gpu_kernel"), ("reductions", "gpu_reduction")):
            on_progress(part)

            def keep(found: Any, part: str = part) -> None:
                kernels[part] = found[part]
                on_report(_report(options, results, kernels))

            keep(_child(module, _kernel_payload(options, device), environment, keep))
    report = _report(options, results, kernels)
    on_report(report)
    return report


def _report(
    options: GpuOptions, results: dict[str, Any], kernels: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    return {
        "benchmark": "gpu",
        "settings": asdict(options),
        "provenance": {**provenance(), "device": _device_name()},
        "results": results,
        "kernels": kernels["kernels"],
        "reductions": [
            {**each, "prefill_share": prefill_share(options, results, each)}
            for each in kernels["reductions"]
        ],
        "ratios": {str(context): ratios(results, str(context)) for context in options.contexts},
    }


def prefill_share(
    options: GpuOptions, results: dict[str, Any], reduction: dict[str, Any]
) -> float | None:
    """What all layers' reductions are of stock's prefill of the same prompt; None without one."""
    stock = results.get("stock", {}).get("contexts", {}).get(str(reduction["context"]))
    if stock is None:
        return None
    seconds: float = reduction["layer_seconds"] * options.model.num_layers
    return seconds / float(stock["prefill_seconds"])


def side_payload(options: GpuOptions, side: str, model: str) -> dict[str, Any]:
    """What a side's process is told."""
    spindle = {"off": 1.0, "evict": options.keep_ratio, "whole": options.keep_ratio}
    engine = {
        "model": model,
        "load_format": "dummy",
        "dtype": "bfloat16",
        "kv_cache_memory_bytes": options.kv_cache_bytes,
        "block_size": options.block_size,
        "max_model_len": options.max_model_len,
        "enable_prefix_caching": False,
        "seed": options.seed,
        **options.engine,
    }
    if side in spindle:
        engine["additional_config"] = {"spindle": {"keep_ratio": spindle[side]}}
    few = {
        str(n): max(1, min(MOST_AMPLE, options.stock_capacity(n, options.output_len) // 2))
        for n in options.contexts
    }
    many = {
        str(n): int(options.bound_factor * options.stock_capacity(n, options.bound_output_len)) + 1
        for n in options.contexts
    }
    return {
        "engine": engine,
        "extra_args": {KEEP_RATIO_KEY: 1.0} if side == "whole" else {},
        "contexts": options.contexts,
        "few": few,
        "many": many,
        "output_len": options.output_len,
        "bound_output_len": options.bound_output_len,
        "repeats": options.repeats,
        "seed": options.seed,
    }


def ratios(results: dict[str, Any], context: str) -> dict[str, dict[str, float | None]]:
    """Each side over stock, in one context, as far as both got there."""
    there = {
        side: each["contexts"][context]
        for side, each in results.items()
        if context in each["contexts"]
    }
    stock = there.pop("stock", None)
    found: dict[str, dict[str, float | None]] = {}
    for side, own in there.items() if stock is not None else ():
        found[side] = {
            "capacity": _over(own["bound"], stock["bound"], "peak_running"),
            "bound_throughput": _over(own["bound"], stock["bound"], "output_tokens_per_second"),
            "ample_throughput": _over(own["ample"], stock["ample"], "output_tokens_per_second"),
            "decode_step": _over(own["ample"], stock["ample"], "decode_step_seconds"),
            "single_decode_step": _over(own["single"], stock["single"], "decode_step_seconds"),
            "attention": _over(own["attention"], stock["attention"], "seconds_per_step"),
            "prefill": _over(own, stock, "prefill_seconds"),
        }
    return found


def _over(own: dict[str, Any], stock: dict[str, Any], name: str) -> float | None:
    return own[name] / stock[name] if own[name] is not None and stock[name] else None


def _kernel_payload(options: GpuOptions, device: str) -> dict[str, Any]:
    model = options.model
    return {
        "device": device,
        "contexts": options.contexts,
        "batches": options.kernel_batches,
        "num_layers": model.num_layers,
        "num_kv_heads": model.num_kv_heads,
        "group": model.num_heads // model.num_kv_heads,
        "head_size": model.head_size,
        "block_size": options.block_size,
        "keep_ratio": options.keep_ratio,
        "repeats": 1 if device == "cpu" else 50,
        "seed": options.seed,
    }


def _child(
    module: str,
    payload: dict[str, Any],
    environment: dict[str, str],
    on_result: Callable[[Any], None],
) -> Any:
    child = subprocess.Popen(
        [sys.executable, "-m", f"vllm_spindle.bench.{module}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            "VLLM_LOGGING_LEVEL": "WARNING",
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            **environment,
        },
    )
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(json.dumps(payload))
    child.stdin.close()
    log: list[str] = []
    result = None
    for line in child.stdout:
        word, _, rest = line.partition(" ")
        if word == "result":
            result = json.loads(rest)
            on_result(result)
        else:
            log = [*log[-60:], line]
    if child.wait() != 0:
        if result is None:
            raise RuntimeError(f"{module} failed:\n{''.join(log)}")
        result["failed"] = "".join(log)
    return result


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
