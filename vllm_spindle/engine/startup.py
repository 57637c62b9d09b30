"""Once, in the front process, before the engine starts: check, prepare, say what is on."""

from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_spindle.config import SpindleConfig
from vllm_spindle.engine.compat import version_problem
from vllm_spindle.engine.options import (
    asked_for,
    fit,
    policy_for,
    resolve,
)
from vllm_spindle.engine.platforms import CUDA, target
from vllm_spindle.engine.refusals import config_refusals, raise_if_any

# Under vLLM's logger tree, so that the user's logging settings apply.
logger = init_logger("vllm.spindle")

SCHEDULER = "vllm_spindle.processes.scheduler.SpindleScheduler"
ASYNC_SCHEDULER = "vllm_spindle.processes.scheduler.SpindleAsyncScheduler"


def prepare(vllm_config: VllmConfig) -> bool:
    """Check the configuration and, if spindle is asked for, switch it on.

    Returns:
        Whether the engine will reduce.

    Raises:
        ValueError: for a bad option, or a combination that is not supported.
    """
    asked = asked_for(vllm_config)
    if asked is None:
        return False
    problem = version_problem()
    if problem is not None:
        raise ValueError(f"spindle: {problem}")
    config = fit(vllm_config, asked)
    resolve(vllm_config, config)
    if not config.is_on:
        logger.info("SpindleKV off: keep_ratio is 1.0, the engine is stock")
        return False
    raise_if_any(config_refusals(vllm_config, config))
    _switch_on(vllm_config)
    logger.info("SpindleKV on: %s", describe(vllm_config, config))
    return True


def _switch_on(vllm_config: VllmConfig) -> None:
    platform = target()
    assert platform is not None  # else refused
    vllm_config.parallel_config.worker_cls = platform.worker
    if platform is CUDA:
        logger.warning(
            "SpindleKV on CUDA: checked without a GPU (kernels interpreted, CUDA graphs emulated), "
            "not yet run on a GPU by us"
        )
    is_async = vllm_config.scheduler_config.async_scheduling
    vllm_config.scheduler_config.scheduler_cls = ASYNC_SCHEDULER if is_async else SCHEDULER


def describe(vllm_config: VllmConfig, config: SpindleConfig) -> str:
    """What is on, in one line."""
    policy = policy_for(vllm_config, config)
    bands = " | ".join(f"{band.start}-{band.stop - 1}" for band in policy.bands)
    score = config.score
    if score in ("received", "pooled"):
        score += f" (pooled over {config.pool_kernel})"
    waits = f", reduced after {config.reduce_after} output tokens" if config.reduce_after else ""
    return (
        f"keep_ratio={config.keep_ratio} budget={config.budget} gqa={config.gqa} "
        f"window={config.window} recent={config.recent} score={score}, layers in bands {bands}, "
        f"prompts under {config.min_prompt_len} tokens kept whole{waits}"
    )
