"""An in-process engine, its scheduler and its block pool."""

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from engine_probe.garbage import freeze_imports

BLOCK_SIZE = 32
MAX_IDLE_STEPS = 2000
DEFAULTS = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "block_size": BLOCK_SIZE,
    "kv_cache_memory_bytes": 64 << 20,
    "enable_prefix_caching": False,
}


@dataclass
class Ask:
    """One request: prompt token ids, tokens to generate, and more ``SamplingParams`` fields."""

    prompt: Sequence[int]
    max_tokens: int = 16
    keep_ratio: float | None = None
    fields: dict[str, Any] | None = None
    protected: int | None = None

    @property
    def params(self) -> SamplingParams:
        """Greedy unless ``fields`` say otherwise; never ended by a token."""
        own = {
            "spindle_keep_ratio": self.keep_ratio,
            "spindle_protected_prefix_tokens": self.protected,
        }
        own = {key: value for key, value in own.items() if value is not None}
        fields = {
            "temperature": 0.0,
            "ignore_eos": True,
            "detokenize": False,
            "output_kind": RequestOutputKind.FINAL_ONLY,
            **(self.fields or {}),
        }
        return SamplingParams(max_tokens=self.max_tokens, extra_args=own or None, **fields)


class Engine:
    """vLLM's ``LLM``, driven step by step."""

    def __init__(self, model: str, spindle: dict[str, Any] | None, **options: Any) -> None:
        if "numba" in sys.modules:  # made to load by a test, before a stock engine too
            from vllm_spindle_patches import kernel_overrides

            kernel_overrides.apply()
        section = {} if spindle is None else {"additional_config": {"spindle": spindle}}
        self.llm = LLM(model, **{**DEFAULTS, **section, **options})
        self.engine = self.llm.llm_engine
        self._idle_steps = 0
        self.core = self.engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers

    def chunk(self, num_tokens: int) -> None:
        """From now on at most this many tokens a step (``max_num_batched_tokens``)."""
        self.scheduler.max_num_scheduled_tokens = num_tokens

    def add(self, request_id: str, ask: Ask) -> None:
        """Queue a request."""
        self.engine.add_request(request_id, {"prompt_token_ids": list(ask.prompt)}, ask.params)

    def step(self) -> list[RequestOutput]:
        """One engine step; what it put out.

        Raises:
            RuntimeError: if nothing has finished for long: requests wait for blocks that leaked.
        """
        outputs = self.engine.step()
        self._idle_steps = 0 if any(out.finished for out in outputs) else self._idle_steps + 1
        if self._idle_steps > MAX_IDLE_STEPS:
            raise RuntimeError(f"stuck with {self.pool.get_num_free_blocks()} blocks free")
        return outputs

    def drain(self) -> dict[str, RequestOutput]:
        """Step until nothing is left; the finished requests."""
        finished = {}
        while self.engine.has_unfinished_requests():
            finished |= {out.request_id: out for out in self.step() if out.finished}
        self.step()  # Let the worker hear of the last ones.
        return finished

    def run(self, asks: Sequence[Ask], prefix: str = "r") -> list[list[int]]:
        """All at once, to the end: the tokens of each."""
        for index, ask in enumerate(asks):
            self.add(f"{prefix}{index}", ask)
        finished = self.drain()
        return [list(finished[f"{prefix}{i}"].outputs[0].token_ids) for i in range(len(asks))]

    @property
    def is_idle_and_free(self) -> bool:
        """Whether every block but the null block is back in the pool."""
        return self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1

    def describe(self) -> dict[str, Any]:
        """Classes that make the engine what it is."""
        executor = self.core.model_executor
        return {
            "worker": self.engine.vllm_config.parallel_config.worker_cls,
            "scheduler": f"{type(self.scheduler).__module__}.{type(self.scheduler).__qualname__}",
            "specs": [type(manager.kv_cache_spec).__name__ for manager in self.managers],
            "managers": [type(manager).__name__ for manager in self.managers],
            "executor": type(executor).__name__,
        }


@contextmanager
def engine(model: str, spindle: dict[str, Any] | None = None, **options: Any) -> Iterator[Engine]:
    """An engine for the time of the block."""
    freeze_imports()
    running = Engine(model, spindle, **options)
    try:
        yield running
    finally:
        # vLLM shuts an engine down when it is collected, and with it the process groups that the
        # next one needs: so now, not later.
        vars(running).clear()
        gc.collect()
        cleanup_dist_env_and_memory()
