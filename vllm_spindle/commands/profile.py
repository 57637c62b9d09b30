"""``vllm-spindle profile``: which kv heads need their tokens, measured, beside the model."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from vllm_spindle.commands.dials import add_dials, read_dials
from vllm_spindle.commands.geometry import read_geometry
from vllm_spindle.config import PROFILE_FILE
from vllm_spindle.core.bands import MAX_DEFAULT_BANDS, default_num_bands

CHOSEN_HERE = (
    "keep_ratio",
    "method",
    "band_methods",
    "budget",
    "head_shares",
    "num_bands",
    "beta",
    "reduce_after",
)
DEFAULT_LENGTHS = "512,1024"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, what to measure on, and the dials that say how tokens are chosen."""
    parser.add_argument("model", metavar="MODEL", help="folder or name; its weights are loaded")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help='one a line: text, or JSON with "prompt" (or "prompt_token_ids") and "followups", a '
        "list of texts asked one after the other; default: generated retrieval tasks",
    )
    parser.add_argument(
        "--num-prompts", type=int, default=24, metavar="N", help="most prompts to use (default 24)"
    )
    parser.add_argument(
        "--lengths",
        default=DEFAULT_LENGTHS,
        metavar="P,P",
        help=f"of generated prompts, tokens (default {DEFAULT_LENGTHS})",
    )
    parser.add_argument(
        "--new-tokens", type=int, default=16, metavar="N", help="of an answer to a prompt of yours"
    )
    parser.add_argument(
        "--trust",
        type=float,
        default=0.8,
        metavar="T",
        help="how far to go from all heads alike to what was measured, 0 to 1, where a quarter or "
        "less is kept; all the way from a half on (default 0.8)",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--out", metavar="FILE", help=f"default: {PROFILE_FILE} in MODEL, where serving finds it"
    )
    add_dials(parser, leave_out=CHOSEN_HERE)


def run(args: argparse.Namespace) -> int:
    """Measure, and write.

    Raises:
        ValueError: for a bad option, model or prompt.
    """
    for name in ("num_prompts", "new_tokens"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag}={getattr(args, name)}: must be at least 1")
    if not 0 <= args.trust <= 1:
        raise ValueError(f"--trust={args.trust}: must be in [0, 1]")
    lengths = _lengths(args.lengths)
    config = read_dials(args)
    if config.gqa == "unfold":
        raise ValueError("--gqa=unfold: copies cannot have blocks of their own; use union or mean")
    out = Path(args.out or Path(args.model) / PROFILE_FILE)
    if not out.parent.is_dir():
        raise ValueError(f"--out: {out.parent} is no folder; say where to write with --out FILE")
    geometry = read_geometry(args.model)
    num_bands = default_num_bands(geometry.num_layers)
    if geometry.num_layers <= MAX_DEFAULT_BANDS:
        num_bands = geometry.num_layers  # a band is as fine as its blocks can be told apart
    points, source, steps = _measure(args, config, lengths)
    document = {
        "made_by": shlex.join(["vllm-spindle", *sys.argv[1:]]),
        "model": args.model,
        "prompts": source,
        "num_bands": num_bands,
        "nats_by_mean_share": steps,
        "head_shares": points,
    }
    out.write_text(_text(document), encoding="utf-8")
    print(f"written: {out}")
    return 0


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        lengths = [0]
    if min(lengths) < 128:
        raise ValueError(f"--lengths={text}: must be numbers of tokens, 128 or more")
    return lengths


def _measure(
    args: argparse.Namespace, config: Any, lengths: list[int]
) -> tuple[dict[float, Any], str, dict[float, float]]:
    """The points, what they were measured on, and nats lost at round mean shares on the way."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from vllm_spindle.calibration.profile import LEAST_MEAN, measure_profile
    from vllm_spindle.calibration.prompts import load_causal_model, load_tokenizer
    from vllm_spindle.calibration.questions import generated_questions, read_questions
    from vllm_spindle.evaluation.asking import dialect_for, stop_ids_of

    if torch.get_num_threads() == 2:
        torch.set_num_threads(1)  # two threads on two cores wait for each other
    tokenizer = load_tokenizer(args.model)
    model = load_causal_model(args.model, args.dtype)
    dialect = dialect_for(tokenizer, model.config)
    stop_ids: set[int] = set()
    if tokenizer is not None:
        stop_ids = stop_ids_of(model, tokenizer, dialect.is_exact)
    if args.prompts is not None:
        source = args.prompts
        questions = read_questions(args.prompts, tokenizer, args.num_prompts, args.new_tokens)
    else:
        if tokenizer is None:
            raise ValueError(f"MODEL={args.model}: it has no tokenizer; give --prompts FILE")
        source = f"generated tasks, {', '.join(map(str, lengths))} tokens"
        questions = generated_questions(tokenizer, dialect, lengths, args.num_prompts)
    steps: dict[float, float] = {}
    columns = (TextColumn("{task.description:<40}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("reading the prompts", total=1 - LEAST_MEAN)

        def on_step(mean: float, loss: float) -> None:
            steps.setdefault(round(mean, 1), round(loss, 5) + 0.0)  # no "-0.0"
            said = f"heads keep {mean:.0%}, lost {loss:.4f} nats"
            progress.update(bar, completed=1 - mean, description=said)

        points = measure_profile(
            model, config, questions, stop_ids=stop_ids, trust=args.trust, on_step=on_step
        )
    return points, source, steps


def _text(document: dict[str, Any]) -> str:
    """JSON with a line for each point."""
    points = document.pop("head_shares")
    head = json.dumps(document, indent=1)[:-2]
    rows = [f'  "{mean}": {json.dumps(shares)}' for mean, shares in points.items()]
    return head + ',\n "head_shares": {\n' + ",\n".join(rows) + "\n }\n}\n"
