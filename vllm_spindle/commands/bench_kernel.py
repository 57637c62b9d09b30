"""``vllm-spindle bench kernel``: its options and its tables."""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

OPTIONS = {
    "num_tokens": "tokens of the context",
    "num_kv_heads": "kv heads",
    "group": "query heads per kv head",
    "head_size": "head size",
    "entries_ratio": "entries of keys, and of values, per token",
    "block_size": "block size of the codebook band",
    "num_layers": "layers to cycle over",
    "repeats": "rounds over all layers",
    "num_threads": "threads of each side",
    "seed": "of the random tokens",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    for name, help_text in OPTIONS.items():
        kind = float if name == "entries_ratio" else int
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=help_text)
    parser.add_argument("--no-build", action="store_true", help="leave out building codebooks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report")


def run(args: argparse.Namespace) -> int:
    """Run, print the tables, write the JSON."""
    from vllm_spindle.bench.build import run_build
    from vllm_spindle.bench.kernel import KernelOptions, run_kernel

    given = {name: getattr(args, name) for name in OPTIONS}
    assert given.keys() == {field.name for field in fields(KernelOptions)}
    options = KernelOptions(**{name: v for name, v in given.items() if v is not None})
    console = Console()
    console.print("compiling, or loading what was compiled before ...")
    rounds = iter(track(range(options.repeats), description="rounds", console=console))
    report = run_kernel(options, lambda done: next(rounds, None))
    next(rounds, None)
    for kind in ("cycling", "hot"):
        console.print(_kernel_table(report, kind))
    if not args.no_build:
        report["build"] = run_build(options)
        console.print(_build_table(report["build"]))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        console.print(f"report written to {args.json}")
    return 0


def _kernel_table(report: dict[str, Any], kind: str) -> Table:
    settings, timed = report["settings"], report[kind]
    ratios = timed["ratios"]
    layers = f"{settings['num_layers']} layers" if kind == "cycling" else "one layer, hot"
    table = Table(
        title=f"decode attention, one layer: {settings['num_tokens']} tokens, "
        f"{settings['num_kv_heads']} kv heads x {settings['group']} queries x "
        f"{settings['head_size']}, entries at {settings['entries_ratio']:.0%}",
        caption=f"{settings['repeats']} rounds over {layers}, "
        f"{settings['num_threads']} thread(s), {report['provenance']['cpu']}\n"
        f"spindle / {timed['best_stock']}: {ratios['min']:.2f} of minima, "
        f"{ratios['median']:.2f} of medians, {ratios['paired']:.2f} paired",
    )
    for title in ("", "min, ms", "median, ms", "max error", "rms error"):
        table.add_column(title, justify="right" if title else "left")
    for name, result in timed["results"].items():
        table.add_row(
            name,
            *(f"{1e3 * result[key]:.2f}" for key in ("min_s", "median_s")),
            *(f"{report['errors'][name][key]:.1e}" for key in ("max_error", "rms_error")),
        )
    return table


def _build_table(build: dict[str, Any]) -> Table:
    wall, processor = build["wall_s"], build["processor_s"]
    table = Table(
        title="building one layer's codebooks, keys and values",
        caption=f"wall {1e3 * wall['min']:.0f} ms min, {1e3 * wall['median']:.0f} ms median; "
        f"processor {1e3 * processor['min']:.0f} ms min, "
        f"{1e3 * processor['median']:.0f} ms median\n"
        + ", ".join(
            f"{name}: {points:+.2f} points" for name, points in build["points_of_full"].items()
        ),
    )
    for title in ("first head", "tokens in", "entries", "mean similarity"):
        table.add_column(title, justify="left" if title == "first head" else "right")
    for name, quality in build["quality"].items():
        table.add_row(
            name,
            str(quality["tokens"]),
            f"{quality['key_entries']} + {quality['value_entries']}",
            f"{quality['key_similarity']:.4f}, {quality['value_similarity']:.4f}",
        )
    return table
