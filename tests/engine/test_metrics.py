"""Our numbers on ``/metrics``, engine after engine in one process."""

from pathlib import Path
from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine

MODEL = str(Path(__file__).parents[2] / "models" / "needle")


def two_engines() -> list[dict[str, float | None]]:
    """What each of two engines, one after the other, shows before its first step and after."""
    from types import SimpleNamespace

    from prometheus_client import REGISTRY
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    from vllm_spindle.engine.metrics import SpindleStatLogger

    config = SimpleNamespace(
        additional_config={"spindle": {"keep_ratio": 0.25}},
        model_config=SimpleNamespace(served_model_name="m"),
    )
    step = {"held_blocks": [1, 3], "prompt_blocks": [4, 4]}
    stats = {"spindle": {"reductions": 2, "seconds": 0.5, "bands": step}}

    def shown() -> dict[str, float | None]:
        labels = {"model_name": "m", "engine": "0"}
        band = {**labels, "band": "1"}
        return {
            "reductions": REGISTRY.get_sample_value("vllm:spindle_reductions_total", labels),
            "held_blocks": REGISTRY.get_sample_value("vllm:spindle_held_blocks_total", band),
            "kept_ratio": REGISTRY.get_sample_value("vllm:spindle_kept_ratio", band),
        }

    found = []
    for _ in range(2):
        # Of a server with two ranks, of which one has worked.
        loggers = [SpindleStatLogger(config, rank) for rank in range(2)]
        unregister_vllm_metrics()  # as vLLM's own logger does, which is made now
        for logger in loggers:
            logger.log_engine_initialized()
        found.append(shown())
        for _ in range(2):
            loggers[0].record(SimpleNamespace(plugin_stats=stats), None)
        found.append(shown())
    return found


def stats_of_engines() -> dict[str, list[Any]]:
    """Of engines asked for no statistics: whether they count, and how many loggers get them."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    found = {}
    for name, config in (("on", {"spindle": {"keep_ratio": 0.25}}), ("off", {})):
        args = AsyncEngineArgs(
            model=MODEL,
            dtype="bfloat16",
            kv_cache_memory_bytes=64 << 20,
            additional_config=config,
            disable_log_stats=True,
        )
        engine = AsyncLLM.from_engine_args(args)
        manager = engine.logger_manager
        found[name] = [engine.log_stats, len(manager.stat_loggers) if manager else 0]
        engine.shutdown()
    return found


def test_off_counts_no_statistics() -> None:
    """Off, ``--disable-log-stats`` is stock's, also after an engine that is on."""
    found = in_child(stats_of_engines)
    assert found["off"] == [False, 0]
    counts, num_loggers = found["on"]
    assert counts and num_loggers >= 1


def test_every_engine_of_a_process_shows_its_own_counts() -> None:
    """vLLM removes the metrics of the one before; ours come back, from zero."""
    found: list[dict[str, Any]] = in_child(two_engines)
    before = {"reductions": 0, "held_blocks": None, "kept_ratio": None}
    after = {"reductions": 4, "held_blocks": 6, "kept_ratio": 0.75}
    assert found == [before, after, before, after]
