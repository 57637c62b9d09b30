"""``vllm-spindle eval``: right answers against true bytes, method by method, with intervals."""

import argparse
import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

BUDGETS = "0.5,0.4,0.3,0.25,0.2,0.15"
PROTOCOLS = "question_last,after_compression"
EVERYTHING = "everything"
LEAST_TOKENS = 128
ALONE = {("in_turn", "single"), ("in_turn", "frequent")}  # tasks of one question: no turns to take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "--model", metavar="PATH", help="as transformers takes; with --endpoint, its tokenizer only"
    )
    parser.add_argument("--endpoint", metavar="URL", help="ask a server with spindle on instead")
    parser.add_argument(
        "--methods",
        default=EVERYTHING,
        metavar="A,B",
        help="rows of the table, ablations by name too (default: every method; with --endpoint it "
        "is the server's own)",
    )
    parser.add_argument(
        "--budgets",
        default=BUDGETS,
        metavar="R,R",
        help=f"shares of the prompt's true KV bytes, (0, 1) (default: {BUDGETS})",
    )
    parser.add_argument(
        "--tasks",
        default=EVERYTHING,
        metavar="A,B",
        help="default: everything that the model can be asked, but for depth, the heat map's",
    )
    parser.add_argument(
        "--protocols", default=PROTOCOLS, metavar="A,B", help=f"default: {PROTOCOLS}"
    )
    parser.add_argument(
        "--lengths", default="1024", metavar="T,T", help="prompt tokens (default: 1024)"
    )
    parser.add_argument(
        "--num-questions",
        type=int,
        default=40,
        metavar="N",
        help="samples of each task, length and seed (default: 40)",
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--out",
        default="build/eval",
        metavar="DIR",
        help="every answer, results.json, table.md; goes on where it stopped (default: build/eval)",
    )
    parser.add_argument(
        "--plots", action="store_true", help="accuracy.png and heat maps too (needs matplotlib)"
    )
    parser.add_argument("--dtype", default="auto", help="of the model's weights (default: auto)")
    parser.add_argument(
        "--num-workers", type=int, default=1, metavar="N", help="processes, one thread each"
    )
    parser.add_argument(
        "--num-parallel", type=int, default=8, metavar="N", help="requests at a time (endpoint)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, then write and print the table. Returns the exit code."""
    if args.model is None and args.endpoint is None:
        raise ValueError("give --model, --endpoint, or both (the model's tokenizer)")
    budgets = _budgets(args.budgets)
    lengths = _lengths(args.lengths)
    for name in ("num_questions", "seeds", "num_workers", "num_parallel"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} must be at least 1, got {getattr(args, name)}")
    # What follows loads for seconds: what is wrong above is said before.
    from vllm_spindle.evaluation.cells import grid, open_folder
    from vllm_spindle.evaluation.plots import need_matplotlib
    from vllm_spindle.evaluation.protocols import PROTOCOLS as EVERY_PROTOCOL
    from vllm_spindle.evaluation.protocols import SERVED as SERVED_PROTOCOLS
    from vllm_spindle.evaluation.results import Results
    from vllm_spindle.evaluation.tasks import FAMILIES

    if args.plots:
        need_matplotlib()
    methods = _methods(args)
    protocols = _named("--protocols", args.protocols, tuple(EVERY_PROTOCOL))
    if args.endpoint and (asked := [p for p in protocols if p not in SERVED_PROTOCOLS]):
        if args.protocols != PROTOCOLS:
            raise ValueError(
                f"--protocols {asked[0]}: a server reduces a prompt whole, question included; "
                f"over HTTP there are {', '.join(SERVED_PROTOCOLS)}"
            )
        protocols = [p for p in protocols if p in SERVED_PROTOCOLS]
    if args.tasks != EVERYTHING:
        _named("--tasks", args.tasks, tuple(FAMILIES))

    make_asker = _make_asker(args)
    asker = make_asker()
    tasks = _tasks(args, asker.dialect, lengths)
    cells = grid(methods, budgets, protocols, tasks, lengths, range(args.seeds))
    cells = [c for c in cells if (c.protocol, c.task) not in ALONE]
    if not cells:
        raise ValueError("no task asked for has the several questions that in_turn needs")
    folder = Path(args.out)
    with open_folder(folder, _settings(args, asker)):
        _measure(args, make_asker, asker, cells, folder)
    results = Results.read(folder, cells, args.num_questions)
    _write(args, results, folder)
    return 0


def _budgets(text: str) -> list[float]:
    budgets = []
    for part in text.split(","):
        try:
            budget = float(part)
        except ValueError:
            raise ValueError(f"--budgets: {part!r} is no number") from None
        if not 0 < budget < 1:
            raise ValueError(f"--budgets must be in (0, 1), got {part}")
        budgets.append(budget)
    return list(dict.fromkeys(budgets))


def _lengths(text: str) -> list[int]:
    lengths = []
    for part in text.split(","):
        if not part.strip().isdigit() or int(part) < LEAST_TOKENS:
            raise ValueError(f"--lengths must be {LEAST_TOKENS} tokens or more, got {part!r}")
        lengths.append(int(part))
    return list(dict.fromkeys(lengths))


def _named(flag: str, text: str, known: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"{flag}: {name!r} is none of: {', '.join(known)}")
    return list(dict.fromkeys(names))


def _methods(args: argparse.Namespace) -> list[str]:
    from vllm_spindle.evaluation.cells import FULL

    if args.endpoint:
        if args.methods != EVERYTHING:
            raise ValueError("--methods cannot go with --endpoint: the method is the server's")
        from vllm_spindle.evaluation.endpoint import SERVED

        return [FULL, SERVED]
    from vllm_spindle.baselines import ABLATIONS, METHODS

    if args.methods == EVERYTHING:
        return list(METHODS)
    return _named("--methods", args.methods, (*METHODS, *ABLATIONS))


def _tasks(args: argparse.Namespace, dialect: Any, lengths: list[int]) -> list[str]:
    """Tasks asked for. Each is tried once, so that what cannot be made is said now."""
    from vllm_spindle.evaluation.tasks import DEPTH, FAMILIES, make_item

    if args.tasks == EVERYTHING:
        names = [name for name in FAMILIES if name in dialect.families and name != DEPTH]
    else:
        names = _named("--tasks", args.tasks, tuple(FAMILIES))
    for name in names:
        for length in lengths:
            make_item(name, dialect, prompt_tokens=length, seed=0, index=0)
    return names


def _make_asker(args: argparse.Namespace) -> Any:
    if args.endpoint:
        return partial(_endpoint, args.endpoint, args.model)
    return partial(_offline, args.model, args.dtype)


def _offline(model: str, dtype: str) -> Any:
    import torch

    from vllm_spindle.evaluation.asking import Offline

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"--dtype: torch has no {dtype!r}")
    return Offline(model, dtype=dtype, num_threads=1)


def _endpoint(url: str, model: str | None) -> Any:
    from vllm_spindle.evaluation.endpoint import Endpoint

    tokenizer = config = None
    if model is not None:
        from transformers import AutoConfig

        from vllm_spindle.calibration.prompts import load_tokenizer

        tokenizer = load_tokenizer(model)
        if tokenizer is None:
            raise ValueError(f"--model {model}: no tokenizer there")
        config = AutoConfig.from_pretrained(model)
    endpoint = Endpoint(url, tokenizer, config)
    if not endpoint.shows_spindle:
        print(
            f"warning: no spindle counters on the /metrics of {url}: without the plugin the "
            "budgets are ignored and every row is full KV",
            file=sys.stderr,
        )
    return endpoint


def _settings(args: argparse.Namespace, asker: Any) -> dict[str, Any]:
    """What must not change between two runs of one folder."""
    return {
        "model": args.model,
        "endpoint": args.endpoint,
        "dialect": asker.dialect.name,
        "dtype": args.dtype,
    }


def _measure(
    args: argparse.Namespace, make_asker: Any, asker: Any, cells: list[Any], folder: Path
) -> None:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from vllm_spindle.evaluation.runner import run_cells, run_cells_in_workers

    columns = (
        TextColumn("{task.description:<56}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("samples", total=len(cells) * args.num_questions)

        def on_samples(cell: Any, count: int) -> None:
            said = f"{cell.protocol} {cell.task} {cell.method} {100 * cell.budget:g} %"
            progress.update(bar, advance=count, description=said)

        if args.num_workers > 1 and not args.endpoint:
            run_cells_in_workers(
                make_asker,
                cells,
                folder,
                args.num_questions,
                num_workers=args.num_workers,
                on_samples=on_samples,
            )
            return
        run_cells(
            asker,
            cells,
            folder,
            args.num_questions,
            num_parallel=args.num_parallel if args.endpoint else 1,
            on_samples=on_samples,
        )


def _write(args: argparse.Namespace, results: Any, folder: Path) -> None:
    from vllm_spindle.bench.provenance import provenance
    from vllm_spindle.evaluation.plots import plot_accuracy, plot_depths
    from vllm_spindle.evaluation.table import markdown

    text = markdown(results)
    (folder / "table.md").write_text(text, encoding="utf-8")
    document = {
        "command": shlex.join(["vllm-spindle", *sys.argv[1:]]),
        "provenance": provenance(),
        "settings": {k: v for k, v in vars(args).items() if k != "command"},
        "rows": results.as_json(),
    }
    (folder / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if args.plots:
        plot_accuracy(results, folder / "accuracy.png")
        plot_depths(results, folder)
    print(text, end="")
    print(f"written to {folder}", file=sys.stderr)
