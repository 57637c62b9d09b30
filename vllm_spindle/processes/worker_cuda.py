"""The CUDA worker process: banded KV-cache specs, the wrapped backend, the reduction."""

from vllm.logger import init_logger
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
        available = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes:
            return available
        reserved = reserved_bytes(self.vllm_config)
        logger.info("SpindleKV takes %.2f GiB beside the KV cache", reserved / (1 << 30))
        return available - reserved
