"""The demo's figures as a table, and what they say in two sentences."""

from typing import Any

from rich.console import Console
from rich.table import Table


def print_demo(report: dict[str, Any]) -> bool:
    """Print stock, plugin and their ratio, the plan below. Returns whether the plan was met."""
    stock, plugin, plan = report["stock"], report["plugin"], report["plan"]
    held = report["held_bytes"]
    console = Console()
    table = Table(
        title=f"{stock['num_questions']} needle questions of {plan['prompt_len']} tokens at once, "
        "the same flags, the same KV memory"
    )
    table.add_column("measured on vllm serve")
    for side in ("stock", "plugin", "ratio"):
        table.add_column(side, justify="right")
    for row in _rows(stock, plugin, held):
        table.add_row(*row)
    console.print(table)
    bands = " + ".join(str(band["held_blocks"]) for band in plan["bands"])
    is_met = plugin["held_blocks"] == plan["held_blocks"]
    agrees = "as planned" if is_met else "NOT as planned"
    console.print(
        f"Plan for keep_ratio {plan['asked_ratio']:g}: {bands} = {plan['held_blocks']} blocks over "
        f"{len(plan['bands'])} bands; measured {plugin['held_blocks']}, {agrees}. A stock block "
        f"spans all {plan['geometry']['num_layers']} layers, a plugin block one band's.",
        highlight=False,
    )
    console.print(
        f"After prefill a prompt holds {held['plugin'] / held['stock']:.2f} of stock's KV memory, "
        f"so {plugin['peak_running']} requests run where {stock['peak_running']} did; "
        f"{plugin['num_exact']} of {plugin['num_questions']} answers are exact, stock "
        f"{stock['num_exact']}.",
        highlight=False,
    )
    return is_met


def _rows(
    stock: dict[str, Any], plugin: dict[str, Any], held: dict[str, int]
) -> list[tuple[str, str, str, str]]:
    def row(title: str, form: str, a: float, b: float) -> tuple[str, str, str, str]:
        return title, form.format(a), form.format(b), f"{b / a:.2f} x" if a else ""

    def of(name: str) -> tuple[float, float]:
        return stock[name], plugin[name]

    def per_second(name: str) -> tuple[float, float]:
        return stock[name] / stock["seconds"], plugin[name] / plugin["seconds"]

    count = "{:,.0f}"
    blocks = [f"{side['held_blocks']} of {side['num_blocks']}" for side in (stock, plugin)]
    return [
        row("answered exactly", count, *of("num_exact")),
        ("KV blocks held after prefill, one request", *blocks, ""),
        row("  in KiB", count, held["stock"] / 1024, held["plugin"] / 1024),
        row("peak running requests", count, *of("peak_running")),
        row("KV memory in use at the peak", "{:.0%}", *of("peak_used_ratio")),
        row("preemptions", count, *of("preemptions")),
        row("output tokens per second, whole run", count, *per_second("output_tokens")),
        row("time for all questions, s", "{:.1f}", *of("seconds")),
    ]
