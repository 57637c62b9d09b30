"""The CPU worker process: banded KV-cache specs, the wrapped backend, the reduction."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_spindle.engine.layers import spindle_backend, spindle_spec
from vllm_spindle.engine.worker import SpindleWorkerMixin
from vllm_spindle_patches import attention_layer, kernel_overrides, plugin_stats

attention_layer.apply(kv_cache_spec=spindle_spec, attn_backend=spindle_backend)
kernel_overrides.apply()
plugin_stats.apply()


class SpindleCPUWorker(SpindleWorkerMixin, CPUWorker):
    """vLLM's CPU worker with the reduction after each step."""
