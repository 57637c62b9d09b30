"""Our numbers on vLLM's own ``/metrics``.

Tokens are counted where placeholders are, in the front process; seconds and encoder runs come from
the worker by way of the scheduler's statistics.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import Counter
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_covipal.engine.options import attached

NAME = "covipal"
MODEL = ["model_name"]
ENGINE = ["model_name", "engine"]

TOKEN_COUNTERS = {
    "visual_tokens": "visual tokens of pruned images and videos before pruning, of every prompt "
    "that was processed, rendered or tokenized alone, too",
    "visual_tokens_kept": "those of them that stand in the prompts",
}
WORKER_COUNTERS = {
    "items": ("pruned_items", "images and videos pruned by the worker"),
    "encoded": ("encoder_runs", "pruned items that the vision tower encoded"),
    "reused": ("encoder_reuses", "pruned items whose embeddings were kept from another question"),
    "seconds": ("selection_seconds", "seconds spent choosing visual tokens"),
}


def count_tokens(model_name: str, num_tokens: int, num_kept: int) -> None:
    """Count the items of one prompt.

    Args:
        model_name: as served.
        num_tokens: placeholders that the stock processor would have written.
        num_kept: those that are written.
    """
    metrics = _metrics()
    metrics["visual_tokens"].labels(model_name).inc(num_tokens)
    metrics["visual_tokens_kept"].labels(model_name).inc(num_kept)


def worker_stats(runner: Any) -> dict[str, float] | None:
    """What a model runner's pruner did since it was last asked."""
    pruner = getattr(runner.get_model(), "visual_pruner", None)
    return None if pruner is None else pruner.take_stats()


def stat_logger_classes(vllm_config: VllmConfig) -> Sequence[type[StatLoggerBase]]:
    """What an engine of this configuration counts with beside vLLM's own."""
    return [CovipalStatLogger] if attached(vllm_config.model_config) is not None else []


class CovipalStatLogger(StatLoggerBase):
    """Counts what workers report with each step; inert unless covipal is on."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        """As vLLM's stat loggers."""
        self._is_on = attached(vllm_config.model_config) is not None
        self._labels = (vllm_config.model_config.served_model_name, str(engine_index))

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Add one step's counts."""
        payload = scheduler_stats.plugin_stats if self._is_on and scheduler_stats else None
        stats: Mapping[str, float] = (payload or {}).get(NAME) or {}
        for key, value in stats.items():
            _metrics()[key].labels(*self._labels).inc(value)

    def log_engine_initialized(self) -> None:
        """Show the metrics, at zero.

        Not in ``__init__``: vLLM's own Prometheus logger is made after ours, and removes every
        ``vllm:`` metric that it finds.
        """
        if self._is_on:
            metrics = _metrics()
            for name in TOKEN_COUNTERS:
                metrics[name].labels(self._labels[0])
            for name in WORKER_COUNTERS:
                metrics[name].labels(*self._labels)


def _metrics() -> dict[str, Any]:
    """The metrics of this process, created once: the engines of a server share them."""
    if not _created:
        for name, text in TOKEN_COUNTERS.items():
            _created[name] = Counter(f"vllm:covipal_{name}", text, MODEL)
        for key, (name, text) in WORKER_COUNTERS.items():
            _created[key] = Counter(f"vllm:covipal_{name}", text, ENGINE)
    return _created


_created: dict[str, Any] = {}
