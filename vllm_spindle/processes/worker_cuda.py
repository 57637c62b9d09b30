"""The CUDA worker process: banded KV-cache specs, the wrapped backend, the reduction."""

from typing import Any

from vllm.logger import init_logger
from vllm.utils.gpu_sync_debug import with_gpu_sync_check
from vllm.v1.worker.gpu_worker import Worker

from vllm_spindle.engine.layers import spindle_backend, spindle_spec
from vllm_spindle.engine.memory import reserved_bytes
from vllm_spindle.engine.worker import SpindleWorkerMixin
from vllm_spindle_patches import attention_layer, plugin_stats

attention_layer.apply(kv_cache_spec=spindle_spec, attn_backend=spindle_backend)
plugin_stats.apply()

# Under vLLM's logger tree, so that the user's logging settings apply.
logger = init_logger("vllm.spindle")


class SpindleGPUWorker(SpindleWorkerMixin, Worker):
    """vLLM's GPU worker with the reduction after each step."""

    def determine_available_memory(self) -> int:
        """vLLM's answer less what the reduction takes, unless the user has given a size."""
        # Asked before: VLLM_ENABLE_STARTUP_PLAN writes a size of vLLM's own there, without ours.
        is_given = bool(self.cache_config.kv_cache_memory_bytes)
        available = super().determine_available_memory()
        if is_given:
            return available
        reserved = reserved_bytes(self.vllm_config)
        logger.info("SpindleKV takes %.2f GiB beside the KV cache", reserved / (1 << 30))
        return available - reserved

    def execute_model(self, scheduler_output: Any) -> Any:
        """The step; VLLM_GPU_SYNC_CHECK looks at what we do before and after it, too."""
        reduction = self._reduction
        if reduction is not None and reduction.reducer.policy.config.merges:
            # Codebooks are built on the CPU: they have to wait.
            return super().execute_model(scheduler_output)
        return self._execute_checked(scheduler_output)

    @with_gpu_sync_check
    def _execute_checked(self, scheduler_output: Any) -> Any:
        return super().execute_model(scheduler_output)
