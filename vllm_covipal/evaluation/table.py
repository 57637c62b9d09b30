"""The accuracy table as Markdown, and as a plot where matplotlib is installed."""

from pathlib import Path
from typing import Any

from vllm_covipal.evaluation.accuracy import ALL, REFERENCE, Results, Row
from vllm_covipal.evaluation.bootstrap import difference_interval, mean_interval


def markdown(results: Results) -> str:
    """A line a row: figures in percent, the last column with its 95 % interval.

    ``ppm ahead`` is the mean of the differences question by question, with its interval: a method
    is behind where the interval is above 0.
    """
    types = results.types()
    heads = ["method", "keep ratio", "tokens a layer", *types, "95 %", "ppm ahead by"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * 2 + "---:|" * (len(heads) - 2)]
    for row in results.rows:
        lines.append("| " + " | ".join(_cells(results, row, types)) + " |")
    return "\n".join(lines) + "\n"


def _cells(results: Results, row: Row, types: list[str]) -> list[str]:
    ratio = "" if row.keep_ratio is None else f"{row.keep_ratio:g}"
    tokens = "" if row.tokens_per_layer is None else f"{row.tokens_per_layer:.0f}"
    means = []
    for type in types:
        figures = results.of_type(row, type)
        means.append(f"{100 * sum(figures) / len(figures):.1f}")
    interval = mean_interval(row.rights)
    reference, ahead = results.reference(row), ""
    if reference is not None and reference is not row:
        gap = difference_interval(reference.rights, row.rights)
        ahead = f"{100 * gap.mean:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"
    span = f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"
    return [row.method, ratio, tokens, *means, span, ahead]


def plot(results: Results, path: str | Path) -> None:
    """Accuracy against keep ratio, a line a method, bands for the intervals.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    from matplotlib import colormaps

    figure: Any = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    by_method: dict[str, list[Row]] = {}
    for row in results.rows:
        by_method.setdefault(row.method, []).append(row)
    colors = colormaps["tab20"].colors
    for i, (method, rows) in enumerate(by_method.items()):
        look: dict[str, Any] = {"color": colors[i % len(colors)], "label": method}
        rows.sort(key=lambda row: row.keep_ratio or 0)  # of several runs, in any order
        intervals = [mean_interval(row.rights) for row in rows]
        if rows[0].keep_ratio is None:
            axes.axhline(100 * intervals[0].mean, linestyle=":", linewidth=1, **look)
            continue
        ratios = [row.keep_ratio for row in rows]
        width = 2.5 if method == REFERENCE else 1.2
        style = "-o" if i < len(colors) else "--s"
        axes.plot(ratios, [100 * i.mean for i in intervals], style, linewidth=width, **look)
        bands = [[100 * i.low for i in intervals], [100 * i.high for i in intervals]]
        axes.fill_between(ratios, *bands, alpha=0.12, color=look["color"])
    axes.set_xscale("log")
    shown = sorted({row.keep_ratio for row in results.rows if row.keep_ratio is not None})
    axes.set_xticks(shown, [f"{100 * ratio:g} %" for ratio in shown], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("visual tokens kept")
    axes.set_ylabel(f"right answers ({ALL}), %")
    figure.legend(fontsize=7, loc="outside right upper")
    figure.savefig(path, dpi=110)
