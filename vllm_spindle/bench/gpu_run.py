"""One side of ``bench gpu``: a fresh process, one engine with a fixed KV pool, every context.

Run as ``python -m vllm_spindle.bench.gpu_run`` with the run's options as JSON on standard input.
The engine core runs in this process. Seconds are of engine steps as the caller waits for them; a
step's output is on the host when it returns, so no device work is left out, and with asynchronous
scheduling the next step's is under way, as in service.
"""

import json
import sys
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np

from vllm_spindle.bench.capacity_run import CapacityResult, StepRecorder

# Parts of the names of attention kernels: FlashAttention, vLLM's Triton attention, ours, the CPU's.
ATTENTION = (
    "flash",
    "fmha",
    "unified_attention",
    "reduce_segments",
    "decode_split",
    "merge_splits",
    "cpu_attention",
)
PROFILED_STEPS = 16


class Side:
    """One engine and its measurements."""

    def __init__(self, options: dict[str, Any]) -> None:
        """Args: options: ``engine`` (of ``LLM``), ``extra_args`` of each request, ``seed``."""
        from vllm import LLM

        self._llm = LLM(**options["engine"], skip_tokenizer_init=True, disable_log_stats=True)
        self._engine = self._llm.llm_engine
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self._extra_args = options["extra_args"]
        self._random = np.random.default_rng(options["seed"])
        self._vocab_size = self._engine.model_config.get_vocab_size()
        self.num_blocks = self._scheduler.kv_cache_manager.block_pool.num_gpu_blocks
        self.num_groups = self._scheduler.kv_cache_manager.num_kv_cache_groups

    def context(self, options: dict[str, Any], length: int) -> Iterator[dict[str, Any]]:
        """Everything about one context length; once without the profiler, which may fail or hang.

        Args:
            options: ``output_len``, ``bound_output_len``, ``repeats``; by context ``few``
                (requests where memory is ample) and ``many`` (where it is short).
            length: prompt tokens of every request.
        """
        few, many = options["few"][str(length)], options["many"][str(length)]
        output_len = options["output_len"]
        self._serve(1, length, 4)  # warm-up: compilation, first calls
        prefill = [self._serve(1, length, 1)["total_seconds"] for _ in range(options["repeats"])]
        found = {
            "prefill_seconds": median(prefill),
            "single": self._serve(1, length, output_len),
            "ample": self._serve(few, length, output_len),
            "bound": self._serve(many, length, options["bound_output_len"]),
            "attention": {"seconds_per_step": None},
        }
        yield found
        try:
            found["attention"] = self._profiled(few, length)
        except RuntimeError as error:  # no profiler on this machine
            found["attention"]["failed"] = str(error)
        yield found

    def _ask(self, count: int, length: int, output_len: int) -> None:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=output_len,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            extra_args=self._extra_args or None,
        )
        prompts = [
            {"prompt_token_ids": self._random.integers(0, self._vocab_size, length).tolist()}
            for _ in range(count)
        ]
        self._llm.enqueue(prompts, params, use_tqdm=False)

    def _serve(self, count: int, length: int, output_len: int) -> dict[str, Any]:
        """Requests, all at once, to the end."""
        result = CapacityResult()
        recorder = StepRecorder(self._scheduler, result)
        steps: list[float] = []
        self._ask(count, length, output_len)
        begin = time.perf_counter()
        try:
            while self._engine.has_unfinished_requests():
                started = time.perf_counter()
                outputs = self._engine.step()
                seconds = time.perf_counter() - started
                # With fewer the step is not the one that is asked about.
                if recorder.is_decode and recorder.num_requests == result.peak_running:
                    steps.append(seconds)
                for output in outputs:
                    if output.finished:
                        result.output_tokens += len(output.outputs[0].token_ids)
        finally:
            recorder.detach()
        total = time.perf_counter() - begin
        return {
            "requests": count,
            "total_seconds": total,
            "output_tokens_per_second": result.output_tokens / total,
            "decode_step_seconds": median(steps) if steps else None,
            "decode_steps": len(steps),
            "peak_running": result.peak_running,
            "preemptions": result.preemptions,
            "reductions": result.reductions,
            "reduction_seconds": result.reduction_seconds,
        }

    def _profiled(self, count: int, length: int) -> dict[str, Any]:
        """Device time of a decode step in attention kernels, and in all, by the profiler."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        result = CapacityResult()
        recorder = StepRecorder(self._scheduler, result)
        on_device = torch.cuda.is_available()
        self._ask(count, length, 4 + PROFILED_STEPS + 4)
        try:
            while not (recorder.is_decode and recorder.num_requests == count):
                self._engine.step()
            activities = [ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU]
            with profile(activities=activities) as profiled:
                for _ in range(PROFILED_STEPS):
                    self._engine.step()
                if on_device:
                    torch.cuda.synchronize()
            while self._engine.has_unfinished_requests():
                self._engine.step()
        finally:
            recorder.detach()
        kernels: dict[str, float] = {}
        for event in profiled.key_averages():
            micros = event.self_device_time_total if on_device else event.self_cpu_time_total
            kernels[event.key] = kernels.get(event.key, 0.0) + micros / 1e6 / PROFILED_STEPS
        attention = {
            name: seconds
            for name, seconds in kernels.items()
            if any(part in name.lower() for part in ATTENTION)
        }
        return {
            "batch": count,
            "seconds_per_step": sum(attention.values()),
            "all_kernels_seconds_per_step": sum(kernels.values()),
            "kernels": dict(sorted(attention.items(), key=lambda item: -item[1])[:6]),
        }


def main() -> None:
    """Read the options, run, print ``result {json}``, again after each part of a context."""
    options = json.load(sys.stdin)
    side = Side(options)
    result: dict[str, Any] = {"num_blocks": side.num_blocks, "num_groups": side.num_groups}
    result["contexts"] = {}
    for length in options["contexts"]:
        for found in side.context(options, length):
            result["contexts"][str(length)] = found
            print("result " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
