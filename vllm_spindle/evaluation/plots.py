"""An evaluation as pictures: accuracy against true bytes, and the heat map of depth by length."""

from pathlib import Path
from typing import Any

from vllm_spindle.evaluation.cells import FULL
from vllm_spindle.evaluation.results import REFERENCE, Results
from vllm_spindle.evaluation.tasks import DEPTH, NUM_DEPTHS

MARKERS = "osD^v<>PX*hp"


def need_matplotlib() -> None:
    """Refuse before anything is measured.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(
            "--plots needs matplotlib: pip install 'vllm-spindle[plots]'; or leave --plots out"
        ) from None


def plot_accuracy(results: Results, path: Path) -> None:
    """A panel for each protocol, a line for each method, bars for the 95 % intervals."""
    protocols = [protocol for protocol in results.protocols if results.counting(protocol)]
    if not protocols:
        return
    figure = _figure(5.2 * len(protocols), 4.4)
    for axes, protocol in zip(
        figure.subplots(1, len(protocols), squeeze=False, sharey=True)[0], protocols, strict=True
    ):
        _panel(axes, results, protocol)
    figure.axes[0].set_ylabel("right answers, %")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)


def _panel(axes: Any, results: Results, protocol: str) -> None:
    from matplotlib import colormaps

    methods = list(dict.fromkeys(method for method, _ in results.columns))
    colours = colormaps["tab20"].colors
    for i, method in enumerate(methods):
        columns = [column for column in results.columns if column[0] == method]
        if method == FULL:
            height = results.accuracy(protocol, columns[0])
            axes.axhline(100 * height.mean, linestyle=":", color="grey", label=FULL)
            continue
        points = []
        for column in columns:
            interval = results.accuracy(protocol, column)
            ratio = results.true_ratio(protocol, column) or column[1]
            below, above = interval.mean - interval.low, interval.high - interval.mean
            points.append([100 * x for x in (ratio, interval.mean, below, above)])
        points.sort()
        ratios, means, below, above = zip(*points, strict=True)
        is_ours = method == REFERENCE
        axes.errorbar(
            ratios,
            means,
            yerr=[below, above],
            label=method,
            color="black" if is_ours else colours[i % len(colours)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            linewidth=2.4 if is_ours else 1.1,
            capsize=2,
            zorder=3 if is_ours else 2,
        )
    axes.set_title(protocol)
    axes.set_xlabel("true bytes of the prompt's KV cache, %")
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)


def plot_depths(results: Results, folder: Path) -> list[Path]:
    """Heat maps of the task ``depth``: a file for each protocol, a panel for each column.

    Returns:
        The files; none if the task was not run.
    """
    lengths = sorted(length for task, length in results.kinds if task == DEPTH)
    paths = []
    for protocol in results.protocols if lengths else []:
        columns = results.columns
        num_columns = min(5, len(columns))
        num_rows = -(-len(columns) // num_columns)
        figure = _figure(2.6 * num_columns + 1, 2.5 * num_rows + 0.4)
        panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
        image = None
        for axes, column in zip(panels, columns, strict=False):
            image = _heat_map(axes, results, protocol, column, lengths)
        for axes in panels[len(columns) :]:
            axes.set_visible(False)
        figure.colorbar(image, ax=list(panels), label="right answers, %")
        figure.suptitle(f"{protocol}: depth of the needle (down) by prompt tokens")
        path = folder / f"depth_{protocol}.png"
        figure.savefig(path, dpi=110)
        paths.append(path)
    return paths


def _heat_map(
    axes: Any, results: Results, protocol: str, column: tuple[str, float], lengths: list[int]
) -> Any:
    rows = [[float("nan")] * len(lengths) for _ in range(NUM_DEPTHS)]
    for x, length in enumerate(lengths):
        lines = results.of(protocol, column, (DEPTH, length))
        for y in range(NUM_DEPTHS):
            rights = [line.rights[0] for line in lines if line.index % NUM_DEPTHS == y]
            if rights:
                rows[y][x] = 100 * sum(rights) / len(rights)
    image = axes.imshow(rows, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=7)
    axes.set_yticks(range(0, NUM_DEPTHS, 3), [f"{10 * y + 5} %" for y in range(0, NUM_DEPTHS, 3)])
    axes.tick_params(labelsize=7)
    method, budget = column
    axes.set_title(method if method == FULL else f"{method}, {100 * budget:g} %", fontsize=8)
    return image


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
