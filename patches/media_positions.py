"""Hook: a model of another plugin may set the positions of its media while a chunk is computed.

The model runner asks a model for that (``recompute_mrope_positions``) only where vLLM's own video
pruning is on, and the V1 CPU runner never. Runners V1 and V2.
"""

import functools
from typing import Any

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu.model_states import default
from vllm.v1.worker.gpu.model_states.mm_pruning import MultiModalPruner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_spindle_patches.guard import is_applied, mark_applied, require_parameters

ATTRIBUTE = "repositions_pruned_media"


def apply() -> None:
    """Let a model class with ``repositions_pruned_media = True`` be asked."""
    for runner in (GPUModelRunner, CPUModelRunner):
        stock = require_parameters(runner, "load_model", "self", "load_dummy_weights")
        if not is_applied(stock):
            runner.load_model = mark_applied(_wrapped(stock))  # type: ignore[method-assign]
    make = require_parameters(
        default, "maybe_create_mm_pruner", "model_config", "model", "rope_state", "encoder_cache"
    )
    if not is_applied(make):
        default.maybe_create_mm_pruner = mark_applied(_made(make))


def _made(stock: Any) -> Any:
    @functools.wraps(stock)
    def maybe_create_mm_pruner(
        model_config: Any, model: Any, rope_state: Any, encoder_cache: Any
    ) -> Any:
        pruner = stock(model_config, model, rope_state, encoder_cache)
        asked = getattr(model, ATTRIBUTE, False)
        if pruner is not None or not asked or rope_state is None or encoder_cache is None:
            return pruner
        width = model_config.get_inputs_embeds_size()
        return MultiModalPruner(model, rope_state, encoder_cache, width)

    return maybe_create_mm_pruner


def _wrapped(stock: Any) -> Any:
    @functools.wraps(stock)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        if getattr(self.get_model(), ATTRIBUTE, False):
            self.is_multimodal_pruning_enabled = True

    return load_model
