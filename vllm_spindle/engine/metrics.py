"""Our numbers on vLLM's own ``/metrics``: a stat logger of engines that spindle is on for."""

from collections.abc import Sequence
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_spindle.engine.options import switched_on

LABELS = ["model_name", "engine"]
BAND_LABELS = [*LABELS, "band"]


def stat_logger_classes(vllm_config: VllmConfig) -> Sequence[type[StatLoggerBase]]:
    """What an engine of this configuration counts with beside vLLM's own."""
    return [SpindleStatLogger] if switched_on(vllm_config) is not None else []


class SpindleStatLogger(StatLoggerBase):
    """Counts what the scheduler reports with each step.

    Band metrics count blocks of that band's KV-cache group, or tokens of each of its layers.
    """

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self._is_on = switched_on(vllm_config) is not None
        self._labels = (vllm_config.model_config.served_model_name, str(engine_index))
        self._prompt_blocks: dict[int, int] = {}
        self._held_blocks: dict[int, int] = {}

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Add one step's counts."""
        payload = scheduler_stats.plugin_stats if self._is_on and scheduler_stats else None
        stats = (payload or {}).get("spindle")
        if stats is None:
            return
        metrics = _metrics()
        metrics["reductions"].labels(*self._labels).inc(stats["reductions"])
        metrics["seconds"].labels(*self._labels).inc(stats["seconds"])
        for name in BAND_COUNTERS:
            for band, count in enumerate(stats["bands"].get(name, ())):
                metrics[name].labels(*self._labels, str(band)).inc(count)
        for band, (held, prompt) in enumerate(
            zip(stats["bands"]["held_blocks"], stats["bands"]["prompt_blocks"], strict=True)
        ):
            self._update_ratio(band, held, prompt)

    def _update_ratio(self, band: int, held: int, prompt: int) -> None:
        self._held_blocks[band] = self._held_blocks.get(band, 0) + held
        self._prompt_blocks[band] = self._prompt_blocks.get(band, 0) + prompt
        if self._prompt_blocks[band]:
            ratio = self._held_blocks[band] / self._prompt_blocks[band]
            _metrics()["kept_ratio"].labels(*self._labels, str(band)).set(ratio)

    def log_engine_initialized(self) -> None:
        """Show the metrics, at zero.

        Not in ``__init__``: vLLM's own Prometheus logger is made after ours, and removes every
        ``vllm:`` metric that it finds; ours of an engine before this one, too.
        """
        if self._is_on:
            if _created and not _are_shown():
                _created.clear()
            metrics = _metrics()
            metrics["reductions"].labels(*self._labels)
            metrics["seconds"].labels(*self._labels)


BAND_COUNTERS = {
    "blocks_freed": "KV-cache blocks freed after prefill, by band",
    "tokens_evicted": "prompt tokens evicted, mean of a band's layers and kv heads",
    "prompt_blocks": "KV-cache blocks that prompts filled in prefill, by band",
    "held_blocks": "KV-cache blocks that prompts hold after their reduction, by band",
    "protected_blocks": "KV-cache blocks of protected prefixes, held whole and shared, by band",
    "tokens_merged": "prompt tokens kept as codes, mean of a band's layers and kv heads",
    "codebook_vectors": "keys and values given a code, over heads and layers, by band",
    "codebook_entries": "codebook entries used, over heads and layers, by band",
    "codebook_capacity": "codebook entries that there was room for, by band",
    "codebook_overflow": "keys and values turned away for want of an entry, by band",
    "codebook_similarity_sum": "cosines of keys and values to their entries, summed, by band",
}


def _metrics() -> dict[str, Any]:
    """The metrics of this process, created once: the engines of a server share them."""
    if not _created:
        _created["reductions"] = Counter(
            "vllm:spindle_reductions", "Prompts reduced after prefill", LABELS
        )
        _created["seconds"] = Counter(
            "vllm:spindle_reduction_seconds", "Seconds spent reducing prompts", LABELS
        )
        for name, text in BAND_COUNTERS.items():
            _created[name] = Counter(f"vllm:spindle_{name}", text, BAND_LABELS)
        _created["kept_ratio"] = Gauge(
            "vllm:spindle_kept_ratio",
            "Blocks held after reduction over blocks filled in prefill, since start, by band",
            BAND_LABELS,
            multiprocess_mode="mostrecent",
        )
    return _created


def _are_shown() -> bool:
    """Whether the registry still has the metrics that were created."""
    metric = _created["reductions"]
    try:
        REGISTRY.register(metric)
    except ValueError:  # it has them
        return True
    REGISTRY.unregister(metric)
    return False


_created: dict[str, Any] = {}
