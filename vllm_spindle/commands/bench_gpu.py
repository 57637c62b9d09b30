"""``vllm-spindle bench gpu``: its options and its tables."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_spindle.bench.gpu import SIDES, GpuOptions, run_gpu
from vllm_spindle.bench.gpu_shapes import SHAPES

MIB = 1 << 20
GIB = 1 << 30

# row title, key in the ratios, what issue 7 asks of ``evict`` at 0.25
ROWS = (
    ("requests running in the same memory", "capacity", ">= 3.6"),
    ("output tokens/s, memory short", "bound_throughput", ">= 3"),
    ("output tokens/s, memory ample", "ample_throughput", ">= 0.98"),
    ("decode step, same batch", "decode_step", ""),
    ("decode step, one request", "single_decode_step", ""),
    ("attention in a decode step", "attention", "<= 0.30 at 32k"),
    ("prefill of one prompt, reduction included", "prefill", "<= 1.02"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--tiny", action="store_true", help="a small run, to see that it works")
    parser.add_argument("--contexts", default="4096,32768,131072", help="prompt tokens")
    parser.add_argument("--kv-cache-gib", type=float, default=32, help="KV memory of each side")
    parser.add_argument("--keep-ratio", type=float, default=0.25)
    parser.add_argument("--sides", default=",".join(SIDES), help="stock is what ratios are to")
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--bound-output-len", type=int, default=512)
    parser.add_argument("--bound-factor", type=float, default=6, help="requests over capacity")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--attention-backend", help="as vLLM's flag; default: vLLM's choice")
    parser.add_argument("--enforce-eager", action="store_true", help="no graphs, no compilation")
    parser.add_argument(
        "--kernel-batches",
        default="1,8",
        help="'' to leave kernels out, and the reduction of a layer",
    )
    parser.add_argument("--repeats", type=int, default=3, help="prefills; the median is shown")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report")


def run(args: argparse.Namespace) -> int:
    """Run, print the tables, write the JSON."""
    options, console = gpu_options(args), Console()

    def save(report: dict[str, Any]) -> None:
        if args.json:
            args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    report = run_gpu(options, lambda part: console.print(f"running {part} ..."), save)
    for context in options.contexts:
        console.print(_table(report, context))
    if report["kernels"]:
        console.print(_kernel_table(report))
    if report["reductions"]:
        console.print(_reduction_table(report))
    failed = {side: each["failed"] for side, each in report["results"].items() if "failed" in each}
    for side, log in failed.items():
        console.print(f"[bold]{side} broke off[/bold]\n{log}")
    if args.json:
        console.print(f"report written to {args.json}")
    return 1 if failed else 0


def gpu_options(args: argparse.Namespace) -> GpuOptions:
    """From the command line; ``--tiny`` has a shape, contexts and a pool of its own.

    Raises:
        ValueError: for a side that there is not.
    """
    sides = tuple(args.sides.split(","))
    for side in sides:
        if side not in SIDES:
            raise ValueError(f"--sides: {side!r} is none of {', '.join(SIDES)}")
    engine: dict[str, Any] = {"max_num_seqs": args.max_num_seqs}
    if args.attention_backend:
        engine["attention_backend"] = args.attention_backend
    if args.enforce_eager or args.tiny:
        engine["enforce_eager"] = True
    if args.tiny:
        return GpuOptions(
            shape="tiny",
            contexts=(256,),
            kv_cache_bytes=4 * MIB,
            keep_ratio=args.keep_ratio,
            sides=sides,
            output_len=16,
            bound_output_len=32,
            bound_factor=3,
            block_size=32,
            repeats=1,
            seed=args.seed,
            engine={**engine, "max_num_seqs": 64},
            kernel_batches=(2,) if args.kernel_batches else (),
        )
    return GpuOptions(
        shape=args.shape,
        contexts=tuple(int(length) for length in args.contexts.split(",")),
        kv_cache_bytes=int(args.kv_cache_gib * GIB),
        keep_ratio=args.keep_ratio,
        sides=sides,
        output_len=args.output_len,
        bound_output_len=args.bound_output_len,
        bound_factor=args.bound_factor,
        block_size=args.block_size,
        repeats=args.repeats,
        seed=args.seed,
        engine=engine,
        kernel_batches=tuple(int(b) for b in args.kernel_batches.split(",") if b),
    )


def _table(report: dict[str, Any], context: int) -> Table:
    settings, found = report["settings"], report["ratios"].get(str(context), {})
    running = ", ".join(
        f"{side} {each['contexts'][str(context)]['bound']['peak_running']}"
        for side, each in report["results"].items()
        if str(context) in each["contexts"]
    )
    table = Table(
        title=f"{settings['shape']}, prompts of {context} tokens, "
        f"{settings['kv_cache_bytes'] / GIB:g} GiB of KV cache; over stock",
        caption=f"{report['provenance']['device']}; running at once: {running}",
    )
    table.add_column("")
    sides = [side for side in settings["sides"] if side != "stock"]
    for side in sides:
        table.add_column(side, justify="right")
    table.add_column("asked of evict at 0.25", justify="right")
    for title, key, goal in ROWS:
        values = [found.get(side, {}).get(key) for side in sides]
        table.add_row(title, *("" if v is None else f"{v:.3f}" for v in values), goal)
    return table


def _kernel_table(report: dict[str, Any]) -> Table:
    table = Table(
        title="decode attention of one layer, microseconds",
        caption="asked at 32k: evict <= 0.30 of full, codebooks <= 0.5",
    )
    for title in ("context", "rows", "full", "evict", "codebooks", "over full", "error"):
        table.add_column(title, justify="right")
    for row in report["kernels"]:
        full, own = row.get("full_seconds"), row["codebook_seconds"]
        table.add_row(
            str(row["context"]),
            str(row["batch"]),
            *(
                "" if row.get(name) is None else f"{1e6 * row[name]:.1f}"
                for name in ("full_seconds", "evict_seconds", "codebook_seconds")
            ),
            "" if full is None else f"{own / full:.2f}",
            f"{row['codebook_error']:.1e}",
        )
    return table


def _reduction_table(report: dict[str, Any]) -> Table:
    table = Table(
        title="reduction of one layer, microseconds of the device",
        caption="asked: all layers together no more than 0.02 of a prefill",
    )
    columns = ("context", "score", "by torch", "and rank", "move", "all", "to launch")
    for title in (*columns, "over prefill", "error"):
        table.add_column(title, justify="right")
    names = ("score", "torch_score", "score_and_rank", "move", "layer", "layer_host")
    for row in report["reductions"]:
        seconds = [row.get(f"{name}_seconds") for name in names]
        share = row["prefill_share"]
        table.add_row(
            str(row["context"]),
            *("" if each is None else f"{1e6 * each:.1f}" for each in seconds),
            "" if share is None else f"{share:.4f}",
            f"{row['score_error']:.1e}"
            if row["is_moved"] and row["is_ranked"]
            else "wrong tokens kept",
        )
    return table
