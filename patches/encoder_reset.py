"""Hook: what a plugin keeps of encoded media goes when vLLM drops its own.

``reset_encoder_cache`` is how a user, or sleep mode, says that embeddings of earlier weights must
not be used again. It reaches the model runner, which clears its own and asks nobody. Runners V1 and
V2.
"""

import functools
from collections.abc import Callable
from typing import Any

from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_spindle_patches.guard import is_applied, mark_applied, require_parameters

_callbacks: list[Callable[[Any], None]] = []


def apply(callback: Callable[[Any], None]) -> None:
    """Call ``callback(model_runner)`` after each ``reset_encoder_cache``."""
    if callback not in _callbacks:
        _callbacks.append(callback)
    for runner in (GPUModelRunner, GPUModelRunnerV2):
        stock = require_parameters(runner, "reset_encoder_cache", "self")
        if not is_applied(stock):
            runner.reset_encoder_cache = mark_applied(_telling(stock))  # type: ignore[method-assign]


def _telling(stock: Any) -> Any:
    @functools.wraps(stock)
    def reset_encoder_cache(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        for each in _callbacks:
            each(self)

    return reset_encoder_cache
