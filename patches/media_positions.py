"""Hook: a model of another plugin may set the positions of its media while a chunk is computed.

The model runner asks a model for that (``recompute_mrope_positions``) only where vLLM's own video
pruning is on, and the CPU runner never.
"""

import functools
from typing import Any

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_spindle_patches.guard import is_applied, mark_applied, require_parameters

ATTRIBUTE = "repositions_pruned_media"


def apply() -> None:
    """Let a model class with ``repositions_pruned_media = True`` be asked."""
    for runner in (GPUModelRunner, CPUModelRunner):
        stock = require_parameters(runner, "load_model", "self", "load_dummy_weights")
        if not is_applied(stock):
            runner.load_model = mark_applied(_wrapped(stock))  # type: ignore[method-assign]


def _wrapped(stock: Any) -> Any:
    @functools.wraps(stock)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        if getattr(self.get_model(), ATTRIBUTE, False):
            self.is_multimodal_pruning_enabled = True

    return load_model
