"""One reading of a server's ``/metrics``."""

from collections.abc import Iterable
from dataclasses import dataclass

from typing_extensions import Self

Sample = tuple[str, dict[str, str], float]


@dataclass(frozen=True)
class Metrics:
    """All samples of one reading: name, labels, value."""

    samples: tuple[Sample, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """From the text that Prometheus would scrape."""
        from prometheus_client.parser import text_string_to_metric_families  # comes with vLLM

        families = text_string_to_metric_families(text)
        return cls(
            tuple((s.name, s.labels, s.value) for family in families for s in family.samples)
        )

    def total(self, name: str, **labels: str) -> float:
        """Sum over the samples of that name and those labels.

        Raises:
            KeyError: if there is none: a metric that is missing is not a metric at zero.
        """
        found = [value for _, value in self._select(name, labels)]
        if not found:
            raise KeyError(f"{name} {labels} is not among the server's metrics")
        return sum(found)

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """Values by one label's value; empty if the metric has no samples yet."""
        return {labels[label]: value for labels, value in self._select(name, {})}

    def label_of(self, name: str, label: str) -> str:
        """A label's text, where the metric is there for its labels (``*_info``)."""
        return next(labels[label] for labels, _ in self._select(name, {}))

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool that requests may hold: all but the null block."""
        return int(self.label_of("vllm:cache_config_info", "num_gpu_blocks")) - 1

    @property
    def used_blocks(self) -> int:
        """Blocks in use at the last engine step."""
        return round(self.total("vllm:kv_cache_usage_perc") * self.num_blocks)

    def _select(self, name: str, wanted: dict[str, str]) -> Iterable[tuple[dict[str, str], float]]:
        return [
            (labels, value)
            for sample, labels, value in self.samples
            if sample == name and wanted.items() <= labels.items()
        ]
