"""``vllm-spindle demo``: the same questions to stock vLLM and to the plugin, side by side.

Two real ``vllm serve`` processes, one after the other, with the same flags and the same fixed KV
memory. Everything in the table is measured on them, but for the blocks that stock holds: vLLM
counts none, so they follow from its prompt tokens. The plan stands beside what it predicts.
"""

import argparse
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_spindle.commands.dials import add_dials, read_dials
from vllm_spindle.commands.geometry import ModelGeometry, read_geometry
from vllm_spindle.commands.plan import make_report
from vllm_spindle.config import SpindleConfig, with_profile
from vllm_spindle.policy import SpindlePolicy

SIDES = ("stock", "plugin")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the questions, the memory and every dial."""
    parser.add_argument("--model", default="models/needle", help="default: models/needle")
    parser.add_argument("--questions", type=int, default=48, metavar="N", help="default: 48")
    parser.add_argument("--prompt-len", type=int, default=1024, metavar="P", help="default: 1024")
    parser.add_argument("--output-len", type=int, default=64, help="tokens generated (default 64)")
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=16 << 20, metavar="B")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--question-seed", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="torch.compile, not --enforce-eager")
    parser.add_argument("--logs", type=Path, default=Path("build/demo"), help="the servers' logs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    add_dials(parser)


def run(args: argparse.Namespace) -> int:
    """Run both sides, print the table. Returns 1 if the blocks held are not the planned ones.

    Raises:
        ValueError: for a bad option, before anything is started.
        RuntimeError: if a server fails, with the end of its log.
    """
    if args.keep_ratio is None and args.config is None:
        args.keep_ratio = "0.25"
    config = with_profile(read_dials(args), args.model)
    if not config.is_on:
        raise ValueError("--keep-ratio=1.0: nothing to show, choose one below 1, such as 0.25")
    questions = _questions(args)
    geometry = read_geometry(args.model)
    policy = SpindlePolicy(
        config, geometry.num_layers, args.block_size, geometry.num_queries_per_kv
    )
    plan = make_report(policy, geometry, args.prompt_len)
    # Otherwise a plain `kill` would leave the servers behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    from vllm_spindle.commands.demo_run import DemoSide, run_side
    from vllm_spindle.commands.demo_table import print_demo

    args.logs.mkdir(parents=True, exist_ok=True)
    sides = {}
    for name in SIDES:
        flags = serve_flags(args, config if name == "plugin" else None)
        side = DemoSide(name, args.model, flags, args.logs / f"{name}.log")
        sides[name] = run_side(side, questions, args.output_len, args.block_size)
    report = {
        "plan": plan,
        "flags": serve_flags(args, None),
        "stock": asdict(sides["stock"]),
        "plugin": asdict(sides["plugin"]),
        "held_bytes": _held_bytes(sides, policy, geometry),
    }
    as_planned = print_demo(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if as_planned else 1


def serve_flags(args: argparse.Namespace, config: SpindleConfig | None) -> list[str]:
    """The flags of ``vllm serve``: the same for both sides but for ``--additional-config``."""
    flags = {
        "--block-size": args.block_size,
        "--kv-cache-memory-bytes": args.kv_cache_memory_bytes,
        "--max-model-len": args.prompt_len + args.output_len + 4,
        "--max-num-seqs": max(64, args.questions),
        "--dtype": "bfloat16",
    }
    words = [str(word) for pair in flags.items() for word in pair]
    # Off on both sides: spindle needs it off, and the prompts share nothing anyway.
    words.append("--no-enable-prefix-caching")
    if not args.compile:
        words.append("--enforce-eager")
    if config is not None:
        spindle = config.model_dump(exclude_defaults=True)
        words += ["--additional-config", json.dumps({"spindle": spindle})]
    return words


def _questions(args: argparse.Namespace) -> list[Any]:
    from vllm_spindle.evaluation.needle import make_questions

    if args.questions < 1:
        raise ValueError(f"--questions={args.questions}: must be at least 1")
    return make_questions(args.questions, args.prompt_len, seed=args.question_seed)


def _held_bytes(
    sides: dict[str, Any], policy: SpindlePolicy, geometry: ModelGeometry
) -> dict[str, int]:
    """Bytes of the measured blocks: a block of either side holds its own group's layers."""
    layer_bytes = policy.block_size * geometry.token_bytes
    layers = {"stock": geometry.num_layers, "plugin": max(map(len, policy.bands))}
    return {name: sides[name].held_blocks * layer_bytes * layers[name] for name in SIDES}
