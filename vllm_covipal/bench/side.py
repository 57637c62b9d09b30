"""One side of the benchmark: a process with one engine, which does what the parent asks.

Run as ``python -m vllm_covipal.bench.side``: the arguments of ``LLM`` as JSON on the first line of
standard input, then one task a line; each is answered by a line ``result {json}``. The engine
core runs in this process, so that each part is timed and every block counted where it happens.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from vllm_covipal.bench.requests import make_image
from vllm_covipal.config import KEEP_RATIO_KEY


@dataclass
class Measured:
    """What a task's requests took. Seconds are wall time as the caller waits.

    Attributes:
        prompt_tokens: of all requests, as scheduled.
        kv_blocks: most blocks held at once.
        peak_running: most requests running at once.
        preprocess_seconds: in the front process: picture to tensors, prompt to tokens.
        step_seconds: of engine steps: encode, select, prefill and what is generated.
        encode_seconds: vision tower and projector (part of the steps).
        select_seconds: choosing visual tokens (part of the steps).
        processor_seconds: of step_seconds, what the process had a processor for, all threads.
    """

    prompt_tokens: int = 0
    kv_blocks: int = 0
    peak_running: int = 0
    preprocess_seconds: float = 0.0
    step_seconds: float = 0.0
    encode_seconds: float = 0.0
    select_seconds: float = 0.0
    processor_seconds: float = 0.0


class Side:
    """An engine with a stop-watch."""

    def __init__(self, engine: dict[str, Any]) -> None:
        """Start the engine. Args: engine: arguments of ``LLM``."""
        from vllm import LLM

        self._llm = LLM(**engine, disable_log_stats=True)
        core = self._llm.llm_engine.engine_core.engine_core
        self._measured = Measured()
        runner = core.model_executor.driver_worker.worker.model_runner
        self._watch_scheduler(core.scheduler)
        self._watch_encoder(runner.get_model())

    def measure(self, task: dict[str, Any]) -> Measured:
        """Serve a task's requests together.

        Args:
            task: ``prompts``; ``images``, a seed each; ``image_size``; ``max_tokens``;
                ``keep_ratio``, None for one that is not named.
        """
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=task["max_tokens"], temperature=0, ignore_eos=True, detokenize=False
        )
        requests = list(_requests(task))
        self._measured = result = Measured()
        started = time.perf_counter()
        self._llm.enqueue(requests, params, use_tqdm=False)
        result.preprocess_seconds = time.perf_counter() - started
        engine = self._llm.llm_engine
        started, started_processor = time.perf_counter(), time.process_time()
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    result.prompt_tokens += len(output.prompt_token_ids or ())
        result.step_seconds = time.perf_counter() - started
        result.processor_seconds = time.process_time() - started_processor
        result.encode_seconds -= result.select_seconds
        return result

    def _watch_scheduler(self, scheduler: Any) -> None:
        stock_schedule, stock_update = scheduler.schedule, scheduler.update_from_output

        def schedule(*args: Any, **kwargs: Any) -> Any:
            output = stock_schedule(*args, **kwargs)
            pool, result = scheduler.kv_cache_manager.block_pool, self._measured
            held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one is the null block
            result.kv_blocks = max(result.kv_blocks, held)
            result.peak_running = max(result.peak_running, len(scheduler.running))
            return output

        def update(scheduler_output: Any, model_runner_output: Any) -> Any:
            stats = getattr(model_runner_output, "plugin_stats", None) or {}
            self._measured.select_seconds += stats.get("covipal", {}).get("seconds", 0.0)
            return stock_update(scheduler_output, model_runner_output)

        scheduler.schedule, scheduler.update_from_output = schedule, update

    def _watch_encoder(self, model: Any) -> None:
        stock_embed = model.embed_multimodal

        def embed(**kwargs: Any) -> Any:
            with self._encoding():
                return stock_embed(**kwargs)

        model.embed_multimodal = embed

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._measured.encode_seconds += time.perf_counter() - started


def _requests(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    keep_ratio = task["keep_ratio"]
    named = {} if keep_ratio is None else {"mm_processor_kwargs": {KEEP_RATIO_KEY: keep_ratio}}
    for prompt, seed in zip(task["prompts"], task["images"], strict=True):
        image = make_image(seed, *task["image_size"])
        yield {"prompt": prompt, "multi_modal_data": {"image": image}, **named}


def main() -> None:
    """Start the engine, then answer task after task until standard input ends."""
    side = Side(json.loads(sys.stdin.readline()))
    print("result {}", flush=True)
    for line in sys.stdin:
        print("result " + json.dumps(asdict(side.measure(json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
