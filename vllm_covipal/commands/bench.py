"""``vllm-covipal bench``: its options, and what it makes where none are given."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_covipal.bench.prefill import PrefillOptions, batches, run_prefill, singles
from vllm_covipal.commands.bench_tables import tables
from vllm_covipal.config import parse_keep_ratio
from vllm_covipal.selectors import SELECTOR_NAMES

MIB = 1 << 20
MADE_MODEL = "LLaVA-1.5 made on the spot, random weights"
MADE_PPM = "default size, random weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add = parser.add_argument
    add("--model", metavar="PATH", help=f"LVLM with its processor (default: {MADE_MODEL})")
    add("--ppm", metavar="PATH", help=f"folder of its pruning module (default: {MADE_PPM})")
    add(
        "--selectors",
        nargs="+",
        choices=SELECTOR_NAMES,
        default=["ppm", "divprune", "cdpruner", "grid"],
        metavar="NAME",
        help=f"of {', '.join(SELECTOR_NAMES)}; a process each, and batches with the first "
        "(default: ppm divprune cdpruner grid)",
    )
    add("--keep-ratios", nargs="+", type=float, default=[1.0, 0.5, 0.25, 0.1], metavar="R")
    add("--rounds", type=int, default=15, help="single requests a point, medians shown")
    add("--question-words", type=int, default=28)
    add("--image-size", nargs=2, type=int, default=[336, 336], metavar=("WIDTH", "HEIGHT"))
    add("--batches", type=int, default=3, help="batches a point, 0 for none")
    add("--batch-size", type=int, default=12, help="requests of a batch")
    add("--output-len", type=int, default=16, help="tokens that each of them generates")
    add("--kv-cache-mib", type=float, default=96, help="KV memory of each side")
    add("--block-size", type=int, default=32)
    add("--max-model-len", type=int, default=1024)
    add("--max-num-seqs", type=int, default=64)
    add("--max-num-batched-tokens", type=int, default=2048)
    add("--dtype", default="bfloat16")
    add("--load-format", default="auto", help="'dummy' for random weights in --model's shapes")
    add("--compile", action="store_true", help="torch.compile instead of eager")
    add("--threads", type=int, default=1, help="torch threads of each side")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write the whole report")


def run(args: argparse.Namespace) -> int:
    """Run, print the tables, write the JSON."""
    _check(args)
    console = Console()
    with _models(args) as (model, load_format, ppm, sizes):
        options = _options(args, model, load_format, ppm)
        report = _run(options, _processor(model), console)
    report = {"settings": _settings(options, args, sizes), **report}
    for table in tables(report):
        console.print(table)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        console.print(f"report written to {args.json}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what would be refused only after the engines have started."""
    for keep_ratio in args.keep_ratios:
        parse_keep_ratio(keep_ratio)
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    if args.ppm and "ppm" not in args.selectors:
        raise ValueError("--ppm is given but 'ppm' is not among --selectors")
    if args.ppm and not args.model:
        raise ValueError("--ppm needs --model: it was trained for one")
    if args.json and not args.json.resolve().parent.is_dir():
        raise ValueError(f"--json: no folder {args.json.resolve().parent}")


@contextmanager
def _models(
    args: argparse.Namespace,
) -> Iterator[tuple[str, str, str | None, dict[str, Any] | None]]:
    """Model, load format, pruning module and made sizes; what is not given is made meanwhile."""
    # transformers loads for seconds: what is wrong with the arguments was said before.
    from vllm_covipal.bench.random_llava import RandomLlava, write_random_llava, write_random_ppm

    with TemporaryDirectory() as folder:
        model, load_format, sizes = args.model, args.load_format, None
        if model is None:
            made = RandomLlava()
            model, load_format = f"{folder}/model", "dummy"
            sizes = {**asdict(made), "parameters": made.num_parameters()}
            write_random_llava(Path(model), made)
        ppm = args.ppm
        if ppm is None and "ppm" in args.selectors:
            ppm = f"{folder}/ppm"
            write_random_ppm(Path(ppm), model)
        yield model, load_format, ppm, sizes


def _processor(model: str) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(model)
    except OSError as error:
        raise ValueError(f"cannot load the processor of {model}: {error}") from None


def _options(
    args: argparse.Namespace, model: str, load_format: str, ppm: str | None
) -> PrefillOptions:
    engine: dict[str, Any] = {
        "model": model,
        "load_format": load_format,
        "dtype": args.dtype,
        "kv_cache_memory_bytes": int(args.kv_cache_mib * MIB),
        "block_size": args.block_size,
        "max_model_len": args.max_model_len,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "enforce_eager": not args.compile,
        "limit_mm_per_prompt": {"image": 1},
        # Off on every side. No request repeats another's image or question, so that they could
        # only cost.
        "enable_prefix_caching": False,
        "mm_processor_cache_gb": 0,
        "seed": args.seed,
    }
    return PrefillOptions(
        engine=engine,
        selectors=tuple(args.selectors),
        ppm=ppm,
        keep_ratios=tuple(args.keep_ratios),
        num_rounds=args.rounds,
        num_question_words=args.question_words,
        image_size=tuple(args.image_size),
        num_batches=args.batches,
        batch_size=args.batch_size,
        output_len=args.output_len,
        num_threads=args.threads,
        seed=args.seed,
    )


def _settings(
    options: PrefillOptions, args: argparse.Namespace, sizes: dict[str, Any] | None
) -> dict[str, Any]:
    """The settings without folders that are gone."""
    settings = asdict(options)
    settings["engine"]["model"] = args.model or MADE_MODEL
    if "ppm" in args.selectors:
        settings["ppm"] = args.ppm or MADE_PPM
    return settings if sizes is None else {**settings, "made_model": sizes}


def _run(options: PrefillOptions, processor: Any, console: Console) -> dict[str, Any]:
    num_single, num_batched = len(singles(options)), len(batches(options))
    total = num_single * (1 + options.num_rounds) + num_batched * options.num_batches
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("starting engines", total=total)
        return run_prefill(
            options, processor, lambda label: progress.update(bar, advance=1, description=label)
        )
