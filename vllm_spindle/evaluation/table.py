"""An evaluation as Markdown."""

from vllm_spindle.evaluation.bootstrap import Interval
from vllm_spindle.evaluation.cells import FULL
from vllm_spindle.evaluation.results import GATE, REFERENCE, Kind, Results


def markdown(results: Results) -> str:
    """For each protocol: methods by budgets, the lead by budgets, and the tasks one by one.

    Figures in percent; with 95 % intervals of the mean over the tasks that count.
    """
    return "\n".join(part for p in results.protocols for part in _protocol(results, p))


def _protocol(results: Results, protocol: str) -> list[str]:
    counting = results.counting(protocol)
    parts = [f"## {protocol}", ""]
    if not counting:
        return [*parts, f"Full KV is below {100 * GATE:.0f} % on every task: nothing counts.", ""]
    sizes = sorted({len(values) for values in results.rights(protocol, results.columns[0])})
    parts += [f"Mean of {_names(counting)}; {' or '.join(map(str, sizes))} samples each.", ""]
    left_out = [k for k in results.kinds if k not in counting and _was_run(results, protocol, k)]
    if left_out:
        parts += [f"Left out, full KV below {100 * GATE:.0f} %: {_names(left_out)}.", ""]
    parts += [*_accuracies(results, protocol), ""]
    parts += [*_leads(results, protocol), *_tasks(results, protocol), ""]
    return parts


def _was_run(results: Results, protocol: str, kind: Kind) -> bool:
    return bool(results.of(protocol, results.columns[0], kind))


def _methods(results: Results) -> list[str]:
    return list(dict.fromkeys(method for method, _ in results.columns if method != FULL))


def _budgets(results: Results) -> list[float]:
    return sorted({b for method, b in results.columns if method != FULL}, reverse=True)


def _accuracies(results: Results, protocol: str) -> list[str]:
    budgets = _budgets(results)
    lines = _head(["method", *(f"{100 * b:g} %" for b in budgets), "true bytes, %"])
    if (FULL, 1.0) in results.columns:
        said = _said(results.accuracy(protocol, (FULL, 1.0)))
        lines.append(_row([FULL, *[said] * len(budgets), "100"]))
    for method in _methods(results):
        cells, ratios = [], []
        for budget in budgets:
            column = (method, budget)
            there = column in results.columns
            cells.append(_said(results.accuracy(protocol, column)) if there else "")
            ratio = results.true_ratio(protocol, column) if there else None
            ratios.append("?" if ratio is None else f"{100 * ratio:.1f}")
        lines.append(_row([method, *cells, " / ".join(ratios)]))
    return lines


def _leads(results: Results, protocol: str) -> list[str]:
    methods = [method for method in _methods(results) if method != REFERENCE]
    if REFERENCE not in _methods(results) or not methods:
        return []
    budgets = _budgets(results)
    lines = [f"{REFERENCE} ahead by, sample by sample:", ""]
    lines += _head(["method", *(f"{100 * b:g} %" for b in budgets)])
    for method in methods:
        leads = [results.ahead(protocol, (method, budget)) for budget in budgets]
        lines.append(_row([method, *(_said(lead, signed=True) for lead in leads)]))
    return [*lines, ""]


def _tasks(results: Results, protocol: str) -> list[str]:
    kinds = [kind for kind in results.kinds if _was_run(results, protocol, kind)]
    lines = ["Task by task:", ""]
    lines += _head(["method", "budget", *(f"{task} {length}" for task, length in kinds)])
    for method, budget in results.columns:
        figures = []
        for kind in kinds:
            rights = [line.right for line in results.of(protocol, (method, budget), kind)]
            figures.append(f"{100 * sum(rights) / len(rights):.1f}")
        lines.append(_row([method, f"{100 * budget:g} %", *figures]))
    return lines


def _names(kinds: list[Kind]) -> str:
    return ", ".join(f"{task} ({length} tokens)" for task, length in kinds)


def _said(interval: Interval | None, *, signed: bool = False) -> str:
    if interval is None:
        return ""
    form = "{:+.1f}" if signed else "{:.1f}"
    mean, low, high = (
        form.format(100 * figure) for figure in (interval.mean, interval.low, interval.high)
    )
    return f"{mean} ({low} to {high})"


def _head(titles: list[str]) -> list[str]:
    return [_row(titles), "|---|" + "---:|" * (len(titles) - 1)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
