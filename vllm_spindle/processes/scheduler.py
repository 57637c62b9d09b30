"""The engine-core process: vLLM's scheduler, synchronous or asynchronous, with our adapter."""

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_spindle.engine.registration import register_spec
from vllm_spindle.engine.scheduler import SpindleSchedulerMixin
from vllm_spindle_patches import plugin_stats, scheduler_overrides

scheduler_overrides.check()
plugin_stats.apply()
register_spec()


class SpindleScheduler(SpindleSchedulerMixin, Scheduler):
    """Synchronous scheduling."""


class SpindleAsyncScheduler(SpindleSchedulerMixin, AsyncScheduler):
    """Asynchronous scheduling."""
