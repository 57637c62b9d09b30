"""One side of ``bench capacity``: a fresh process, one engine, N requests, one JSON line.

Run as ``python -m vllm_spindle.bench.capacity_run`` with the run's options as JSON on standard
input. The engine core runs in this process, so that every step can be timed and every block
counted where they happen; nothing is estimated.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass
class CapacityResult:
    """What one side did. Seconds are of engine steps, as the caller waits for them.

    Attributes:
        peak_running: most requests running at once.
        preemptions: requests thrown out of memory and computed again.
        min_free_ratio: free share of the block pool at its low point.
        num_blocks: blocks of the pool, all KV-cache groups.
        num_groups: KV-cache groups.
        total_seconds: from the first step to the last.
        prefill_seconds: steps that computed any prompt token.
        decode_seconds: steps that computed none.
        decode_tokens: tokens generated in those.
        output_tokens: tokens generated in all.
        reductions: prompts reduced.
        reduction_seconds: spent reducing them (part of prefill_seconds).
        decode_batches: requests in each decode step.
        codebooks: counts of the codebooks built, over bands, heads and layers; by name.
    """

    peak_running: int = 0
    preemptions: int = 0
    min_free_ratio: float = 1.0
    num_blocks: int = 0
    num_groups: int = 0
    total_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    output_tokens: int = 0
    reductions: int = 0
    reduction_seconds: float = 0.0
    decode_batches: list[int] = field(default_factory=list)
    codebooks: dict[str, float] = field(default_factory=dict)


class StepRecorder:
    """Watches the scheduler of an in-process engine: what each step scheduled and reduced."""

    def __init__(self, scheduler: Any, result: CapacityResult) -> None:
        self._scheduler = scheduler
        self._result = result
        self.is_decode = False
        self.num_requests = 0
        self._stock_schedule = scheduler.schedule
        self._stock_update = scheduler.update_from_output
        scheduler.schedule = self._schedule
        scheduler.update_from_output = self._update

    def detach(self) -> None:
        """Watch no more."""
        self._scheduler.schedule = self._stock_schedule
        self._scheduler.update_from_output = self._stock_update

    def _schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = self._stock_schedule(*args, **kwargs)
        result, pool = self._result, self._scheduler.kv_cache_manager.block_pool
        result.peak_running = max(result.peak_running, len(self._scheduler.running))
        result.preemptions += len(output.preempted_req_ids or ())
        free_ratio = pool.get_num_free_blocks() / (pool.num_gpu_blocks - 1)
        result.min_free_ratio = min(result.min_free_ratio, free_ratio)
        # A decode is one token of a request whose prompt was done before the step.
        requests = self._scheduler.requests
        self.num_requests = len(output.num_scheduled_tokens)
        self.is_decode = self.num_requests > 0 and all(
            count == 1 and requests[i].num_computed_tokens > requests[i].num_prompt_tokens
            for i, count in output.num_scheduled_tokens.items()
        )
        return output

    def _update(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        stats = getattr(model_runner_output, "plugin_stats", None)
        if stats:
            self._result.reductions += stats["spindle"]["reductions"]
            self._result.reduction_seconds += stats["spindle"]["seconds"]
            totals = self._result.codebooks
            for name, counts in stats["spindle"]["bands"].items():
                if name.startswith("codebook_"):
                    short = name.removeprefix("codebook_")
                    totals[short] = totals.get(short, 0) + sum(counts)
        return self._stock_update(scheduler_output, model_runner_output)


def run(options: dict[str, Any]) -> CapacityResult:
    """Serve the requests and measure.

    Args:
        options: ``engine`` (arguments of ``LLM``), ``num_requests``, ``prompt_len``,
            ``output_len``, ``seed``.
    """
    from vllm import LLM, SamplingParams

    llm = LLM(**options["engine"], skip_tokenizer_init=True, disable_log_stats=True)
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    vocab_size = engine.model_config.get_vocab_size()
    generator = np.random.default_rng(options["seed"])
    params = SamplingParams(
        max_tokens=options["output_len"], temperature=0, ignore_eos=True, detokenize=False
    )

    def prompt() -> dict[str, list[int]]:
        return {
            "prompt_token_ids": generator.integers(0, vocab_size, options["prompt_len"]).tolist()
        }

    llm.generate([prompt(), prompt()], params, use_tqdm=False)  # warm-up: caches, first calls
    prompts = [prompt() for _ in range(options["num_requests"])]
    result = CapacityResult(
        num_blocks=core.scheduler.kv_cache_manager.block_pool.num_gpu_blocks,
        num_groups=core.scheduler.kv_cache_manager.num_kv_cache_groups,
    )
    recorder = StepRecorder(core.scheduler, result)
    llm.enqueue(prompts, params, use_tqdm=False)
    finished = 0
    begin = time.perf_counter()
    while engine.has_unfinished_requests():
        started = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - started
        if recorder.is_decode:
            result.decode_seconds += seconds
            result.decode_tokens += recorder.num_requests
            result.decode_batches.append(recorder.num_requests)
        else:
            result.prefill_seconds += seconds
        for output in outputs:
            if output.finished:
                finished += 1
                result.output_tokens += len(output.outputs[0].token_ids)
                print(f"progress {finished}", flush=True)
    result.total_seconds = time.perf_counter() - begin
    return result


def main() -> None:
    """Read the options, run, print ``result {json}``."""
    result = run(json.load(sys.stdin))
    print("result " + json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main()
