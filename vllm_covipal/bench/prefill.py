"""Encode and prefill, stock against pruned: what a request costs, and how many fit.

A point is a side at a keep ratio. A round asks every point for one request, shuffled; no two
requests of a side share an image or a question, and the caches that could notice are off.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from vllm_covipal.bench.provenance import load_average, provenance
from vllm_covipal.bench.requests import make_prompt, make_question
from vllm_covipal.bench.sides import SideProcess, running

STOCK = "stock"


@dataclass(frozen=True)
class PrefillOptions:
    """What to run.

    Attributes:
        engine: arguments of ``LLM`` that every side shares.
        selectors: each a side; the first is measured with a batch of requests too.
        ppm: folder of the pruning module of selector ``ppm``.
        keep_ratios: of the pruned sides.
        num_rounds: rounds of single requests.
        num_question_words: length of a question.
        image_size: of a generated image, width and height.
        num_batches: batches of each point.
        batch_size: requests of a batch.
        output_len: tokens that a batch's requests generate.
        num_threads: of each side.
        seed: of images and questions.
    """

    engine: dict[str, Any]
    selectors: tuple[str, ...]
    ppm: str | None
    keep_ratios: tuple[float, ...]
    num_rounds: int
    num_question_words: int
    image_size: tuple[int, int]
    num_batches: int
    batch_size: int
    output_len: int
    num_threads: int
    seed: int = 0


@dataclass(frozen=True)
class Point:
    """A side at a keep ratio; stock has none."""

    side: str
    keep_ratio: float | None = None

    @property
    def label(self) -> str:
        """Its key in a report."""
        return self.side if self.keep_ratio is None else f"{self.side} {self.keep_ratio:g}"


def run_prefill(
    options: PrefillOptions, processor: Any, on_progress: Callable[[str], None]
) -> dict[str, Any]:
    """Run every point.

    Args:
        options: the settings.
        processor: transformers' processor of the model, for its chat template.
        on_progress: called with the label of each measurement as it ends.

    Returns:
        A JSON-ready report: provenance, every run, medians, ratios to stock.

    Raises:
        RuntimeError: if a side fails, with the end of its log.
    """
    load_before = load_average()
    tasks = TaskMaker(options, processor)
    single, batched = singles(options), batches(options)
    runs: dict[str, list[dict[str, Any]]] = {point.label: [] for point in single}
    batch_runs: dict[str, list[dict[str, Any]]] = {point.label: [] for point in batched}
    with running(_engines(options), options.num_threads, STOCK) as sides:
        for point in single:  # every length once, so that no kernel is prepared in a round
            sides[point.side].measure(tasks.make(point, 1, 1))
            on_progress(point.label)
        for point in _in_rounds(single, options.num_rounds, options.seed):
            runs[point.label].append(_request(sides[point.side], tasks.make(point, 1, 1)))
            on_progress(point.label)
        for point in _in_rounds(batched, options.num_batches, options.seed):
            task = tasks.make(point, options.batch_size, options.output_len)
            batch_runs[point.label].append(_batch(sides[point.side], task))
            on_progress(point.label)
    return {
        "benchmark": "prefill",
        "provenance": {**provenance(), "load": {"before": load_before, "after": load_average()}},
        "request": summarise(runs),
        "batch": summarise(batch_runs),
    }


def singles(options: PrefillOptions) -> list[Point]:
    """Points that are measured with one request."""
    pruned = [Point(side, ratio) for side in options.selectors for ratio in options.keep_ratios]
    return [Point(STOCK), *pruned]


def batches(options: PrefillOptions) -> list[Point]:
    """Points that are measured with a batch: the first selector's."""
    if not options.num_batches:
        return []
    return [Point(STOCK), *(Point(options.selectors[0], ratio) for ratio in options.keep_ratios)]


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each point, and beside stock: the ratio of medians, and the median of the ratios
    within a round, which a machine that slows down for a round does not move."""
    if not runs:
        return {}
    medians = {label: _medians(of) for label, of in runs.items()}
    stock = medians[STOCK]
    return {
        "medians": medians,
        "ratios": {
            label: {name: of[name] / stock[name] for name in of if stock[name]}
            for label, of in medians.items()
        },
        "paired_ratios": {
            label: _medians(
                [
                    {name: run[name] / other[name] for name in run if other[name]}
                    for run, other in zip(of, runs[STOCK], strict=True)
                ]
            )
            for label, of in runs.items()
        },
        "select_share_of_stock": {
            label: of["select_seconds"] / stock["step_seconds"] for label, of in medians.items()
        },
        "runs": {label: _columns(of) for label, of in runs.items()},
    }


class TaskMaker:
    """Tasks for the sides, each with requests that were not made before."""

    def __init__(self, options: PrefillOptions, processor: Any) -> None:
        """Args: options: the settings; processor: for its chat template."""
        self._options = options
        self._processor = processor
        self._next_seed = options.seed

    def make(self, point: Point, num_requests: int, max_tokens: int) -> dict[str, Any]:
        """The task of a point."""
        seeds = list(range(self._next_seed, self._next_seed + num_requests))
        self._next_seed += num_requests
        words = self._options.num_question_words
        return {
            "prompts": [make_prompt(self._processor, make_question(s, words)) for s in seeds],
            "images": seeds,
            "image_size": self._options.image_size,
            "max_tokens": max_tokens,
            "keep_ratio": point.keep_ratio,
        }


def _engines(options: PrefillOptions) -> dict[str, dict[str, Any]]:
    engines = {STOCK: options.engine}
    for name in options.selectors:
        section = {"selector": name} | ({"ppm": options.ppm} if name == "ppm" else {})
        engines[name] = {**options.engine, "additional_config": {"covipal": section}}
    return engines


def _in_rounds(points: list[Point], num_rounds: int, seed: int) -> Iterator[Point]:
    """Every point once a round, shuffled: who comes before whom is worth two per cent."""
    generator = random.Random(seed)
    for _ in range(num_rounds):
        yield from generator.sample(points, len(points))


def _request(side: SideProcess, task: dict[str, Any]) -> dict[str, Any]:
    measured = side.measure(task)
    parts = measured["encode_seconds"] + measured["select_seconds"]
    return {
        **measured,
        "prefill_seconds": measured["step_seconds"] - parts,
        "request_seconds": measured["preprocess_seconds"] + measured["step_seconds"],
    }


def _batch(side: SideProcess, task: dict[str, Any]) -> dict[str, Any]:
    measured = side.measure(task)
    seconds = measured["preprocess_seconds"] + measured["step_seconds"]
    return {**measured, "requests_per_second": len(task["prompts"]) / seconds}


def _columns(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """One list a figure, to the microsecond: a report is read by people too."""
    return {name: [round(run[name], 6) for run in runs] for name in runs[0]}


def _medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {name: median(run[name] for run in runs) for name in runs[0]}
