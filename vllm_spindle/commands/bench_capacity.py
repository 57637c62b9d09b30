"""``vllm-spindle bench capacity``: its options and its table."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vllm_spindle.bench.capacity import CapacityOptions, run_capacity
from vllm_spindle.config import load_config, with_profile

MIB = 1 << 20

# row title, key in the medians, format
ROWS = (
    ("peak running requests", "peak_running", "{:.0f}"),
    ("preemptions", "preemptions", "{:.0f}"),
    ("free blocks at the low point", "min_free_ratio", "{:.1%}"),
    ("requests in a decode step, mean", "mean_decode_batch", "{:.1f}"),
    ("output tokens/s in decode steps", "decode_tokens_per_second", "{:.0f}"),
    ("output tokens/s in all", "output_tokens_per_second", "{:.0f}"),
    ("total time, s", "total_seconds", "{:.2f}"),
    ("prefill steps, s", "prefill_seconds", "{:.2f}"),
    ("reducing, s", "reduction_seconds", "{:.3f}"),
    ("reducing, share of prefill", "reduction_share_of_prefill", "{:.1%}"),
)
# Shown where a band has codebooks.
CODEBOOK_ROWS = (
    ("keys and values merged", "merged_vectors", "{:.0f}"),
    ("codebook entries used", "codebook_fill", "{:.1%}"),
    ("turned away for want of an entry", "codebook_overflow", "{:.1%}"),
    ("cosine to the entry, mean", "codebook_similarity", "{:.3f}"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--model", required=True, help="model path or name")
    parser.add_argument("--keep-ratio", type=float, default=0.25)
    parser.add_argument("--config", help="YAML file of spindle options, instead of --keep-ratio")
    parser.add_argument("--kv-cache-mib", type=float, default=16, help="KV memory of each side")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--num-requests", type=int, default=32)
    parser.add_argument("--prompt-len", type=int, default=1500)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, help="default: the model's")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--load-format", default="auto", help="'dummy' for random weights")
    parser.add_argument("--compile", action="store_true", help="torch.compile instead of eager")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each side")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each side; medians shown")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report")


def run(args: argparse.Namespace) -> int:
    """Run, print the table, write the JSON."""
    options = _capacity_options(args)
    console = Console()
    with _progress(console) as progress:
        bars: dict[tuple[str, int], Any] = {}

        def on_progress(side: str, repeat: int, done: int) -> None:
            key = (side, repeat)
            if key not in bars:
                bars[key] = progress.add_task(f"{side} {repeat + 1}", total=options.num_requests)
            progress.update(bars[key], completed=done)

        report = run_capacity(options, on_progress)
    console.print(_table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        console.print(f"report written to {args.json}")
    return 0


def _capacity_options(args: argparse.Namespace) -> CapacityOptions:
    spindle = load_config(args.config or {"keep_ratio": args.keep_ratio})
    engine: dict[str, Any] = {
        "model": args.model,
        "kv_cache_memory_bytes": int(args.kv_cache_mib * MIB),
        "block_size": args.block_size,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "dtype": args.dtype,
        "load_format": args.load_format,
        "enforce_eager": not args.compile,
        # Off on both sides: the prompts share nothing.
        "enable_prefix_caching": False,
        "seed": args.seed,
    }
    if args.max_model_len:
        engine["max_model_len"] = args.max_model_len
    return CapacityOptions(
        engine=engine,
        spindle=with_profile(spindle, args.model).model_dump(mode="json", exclude_none=True),
        num_requests=args.num_requests,
        prompt_len=args.prompt_len,
        output_len=args.output_len,
        repeats=args.repeats,
        num_threads=args.threads,
        seed=args.seed,
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _table(report: dict[str, Any]) -> Table:
    settings, medians = report["settings"], report["medians"]
    kept = settings["spindle"].get("keep_ratio", 1.0)
    table = Table(
        title=f"{settings['num_requests']} requests of {settings['prompt_len']} + "
        f"{settings['output_len']} tokens, "
        f"{settings['engine']['kv_cache_memory_bytes'] / MIB:g} MiB of KV cache",
        caption=f"medians of {settings['repeats']} run(s) a side, {settings['num_threads']} "
        f"thread(s), {report['provenance']['cpu']}",
    )
    table.add_column("")
    table.add_column("stock", justify="right")
    table.add_column(f"keep {kept:g}", justify="right")
    table.add_column("ratio", justify="right")
    has_codebooks = medians["spindle"]["merged_vectors"] > 0
    for title, key, form in ROWS + (CODEBOOK_ROWS if has_codebooks else ()):
        ratio = report["ratios"].get(key)
        table.add_row(
            title,
            *(form.format(medians[side][key]) for side in ("stock", "spindle")),
            f"{ratio:.2f} x" if ratio else "",
        )
    return table
