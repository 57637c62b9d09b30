"""What calibration measured, as tables on the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_spindle.calibration.plan_file import plan_name


def print_calibration(report: dict[str, Any]) -> None:
    """Print what ``calibrate.make_report`` found."""
    console = Console()
    console.print(
        f"{report['model']}: {report['source']}, {report['num_prompts']} prompts of "
        f"{report['shortest_prompt']} to {report['longest_prompt']} tokens; keep_ratio "
        f"{report['config']['keep_ratio']:g}",
        highlight=False,
    )
    console.print(_covers(report))
    console.print(_bands(report))
    console.print(_wholes(report))
    if report["unfolded"]:
        console.print(_unfolded(report))


def _covers(report: dict[str, Any]) -> Table:
    config = report["config"]
    table = Table(
        title="How redundant the layers are",
        caption=f"entries needed over tokens, by kv head, at theta {config['theta_key']:g} (keys) "
        f"and {config['theta_value']:g} (values); last: one table for all kv heads, keys and "
        "values",
    )
    for title in ("layer", "keys", "values", "scope layer"):
        table.add_column(title, justify="right")
    for cover in report["covers"]:
        table.add_row(
            str(cover["layer"]),
            _shares(cover["keys"]),
            _shares(cover["values"]),
            _shares([cover["layer_keys"], cover["layer_values"]]),
        )
    return table


def _unfolded(report: dict[str, Any]) -> Table:
    table = Table(
        title="The paper's route: a copy per query head, absorbed by a codebook per kv head",
        caption="as large as it takes, so measured and not served; ratios of the context: the "
        "paper's by its eq. 15, of an unfolded cache; true: of the GQA cache, codes included",
    )
    for title in ("layer", "paper's\nratio", "true\nratio", "error\nanswer"):
        table.add_column(title, justify="right")
    for row in report["unfolded"]:
        table.add_row(
            str(row["layer"]),
            f"{row['paper_ratio']:.3f}",
            f"{row['true_ratio']:.3f}",
            f"{row['answer_error']:.4f}",
        )
    return table


def _bands(report: dict[str, Any]) -> Table:
    table = Table(
        title="Each band alone, by method, in the same blocks",
        caption="relative error of attention outputs at the answer's queries (it decides) and the "
        "recent tokens'; overflow: share of context tokens without an entry",
    )
    for title in ("layers", "method", "blocks", "error\nanswer", "error\nrecent", "KL", "overflow"):
        table.add_column(title, justify="right")
    for band in report["bands"]:
        for name, found in band["methods"].items():
            table.add_row(
                f"{band['first_layer']}-{band['last_layer']}" if name == "evict" else "",
                name,
                f"{found['region_blocks']:.1f}",
                f"{found['answer_error']:.4f}",
                f"{found['recent_error']:.4f}",
                f"{found['divergence']:.5f}",
                f"{found['overflow']:.3f}",
                style="bold" if name == band["chosen"] else None,
            )
        table.add_section()
    return table


def _wholes(report: dict[str, Any]) -> Table:
    table = Table(title="All bands together", caption="bold: written")
    for title in ("bands", "KL (nats)", "same token"):
        table.add_column(title, justify="right")
    for whole in report["wholes"]:
        table.add_row(
            plan_name(whole),
            f"{whole['divergence']:.4f}",
            f"{whole['agreement']:.3f}",
            style="bold" if _is_written(whole, report["config"]) else None,
        )
    return table


def _is_written(whole: dict[str, Any], config: dict[str, Any]) -> bool:
    if config["band_methods"] is None:
        return whole.get("budget") == "measured"
    return "budget" not in whole and whole["band_methods"] == config["band_methods"]


def _shares(shares: list[float]) -> str:
    return " ".join(f"{share:.2f}" for share in shares)
