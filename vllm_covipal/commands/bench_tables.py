"""The tables of ``vllm-covipal bench``."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from vllm_covipal.bench.prefill import STOCK

MIB = 1 << 20
MILLI = 1e3

# row title, key in the medians, factor, format
ROWS = (
    ("prompt tokens", "prompt_tokens", 1, "{:.0f}"),
    ("KV blocks", "kv_blocks", 1, "{:.0f}"),
    ("image to tensors, ms", "preprocess_seconds", MILLI, "{:.0f}"),
    ("encode, ms", "encode_seconds", MILLI, "{:.0f}"),
    ("select, ms", "select_seconds", MILLI, "{:.1f}"),
    ("prefill, ms", "prefill_seconds", MILLI, "{:.0f}"),
    ("encode + select + prefill, ms", "step_seconds", MILLI, "{:.0f}"),
)
RATIO_ROWS = (
    ("  of stock: medians", "ratios", "step_seconds"),
    ("  of stock: within rounds", "paired_ratios", "step_seconds"),
    ("  of stock: processor time", "ratios", "processor_seconds"),
)


def tables(report: dict[str, Any]) -> Iterator[Table]:
    """One request, a batch, and what each selector costs."""
    yield _request(report)
    if report["batch"]:
        yield _batch(report)
    yield _selectors(report)


def _request(report: dict[str, Any]) -> Table:
    settings, request = report["settings"], report["request"]
    labels = _first_labels(settings)
    load = report["provenance"]["load"]
    table = Table(
        title=f"one request, one image, selector {settings['selectors'][0]}",
        caption=f"medians of {settings['num_rounds']} rounds, {settings['num_threads']} "
        f"thread(s), {settings['engine']['dtype']}, {report['provenance']['cpu']}, "
        f"load {load['before']} before, {load['after']} after",
    )
    _columns(table, labels)
    medians = request["medians"]
    for title, key, factor, form in ROWS:
        table.add_row(title, *(form.format(factor * medians[label][key]) for label in labels))
    for title, kind, key in RATIO_ROWS:
        table.add_row(title, *(f"{request[kind][label][key]:.2f} x" for label in labels))
    return table


def _batch(report: dict[str, Any]) -> Table:
    settings, batch = report["settings"], report["batch"]
    labels = _first_labels(settings)
    table = Table(
        title=f"{settings['batch_size']} requests of {settings['output_len']} output tokens, "
        f"{settings['engine']['kv_cache_memory_bytes'] / MIB:g} MiB of KV cache",
        caption=f"medians of {settings['num_batches']} batch(es), image processing included",
    )
    _columns(table, labels)
    for title, key, form in (
        ("requests/s", "requests_per_second", "{:.2f}"),
        ("peak running requests", "peak_running", "{:.0f}"),
        ("KV blocks at the peak", "kv_blocks", "{:.0f}"),
    ):
        table.add_row(title, *(form.format(batch["medians"][label][key]) for label in labels))
    ratios = (f"{batch['ratios'][label]['requests_per_second']:.2f} x" for label in labels)
    table.add_row("requests/s of stock", *ratios)
    return table


def _selectors(report: dict[str, Any]) -> Table:
    settings, request = report["settings"], report["request"]
    table = Table(
        title="choosing visual tokens, ms and share of stock's encode + prefill",
        caption="in brackets: encode + select + prefill of stock",
    )
    ratios = settings["keep_ratios"]
    _columns(table, [f"keep {ratio:g}" for ratio in ratios])
    for name in settings["selectors"]:
        cells = []
        for ratio in ratios:
            label = f"{name} {ratio:g}"
            milliseconds = MILLI * request["medians"][label]["select_seconds"]
            share = request["select_share_of_stock"][label]
            of_stock = request["ratios"][label]["step_seconds"]
            cells.append(f"{milliseconds:.1f}  {share:.1%}  ({of_stock:.2f} x)")
        table.add_row(name, *cells)
    return table


def _first_labels(settings: dict[str, Any]) -> list[str]:
    first = settings["selectors"][0]
    return [STOCK, *(f"{first} {ratio:g}" for ratio in settings["keep_ratios"])]


def _columns(table: Table, labels: list[str]) -> None:
    table.add_column("")
    for label in labels:
        table.add_column(label, justify="right")
