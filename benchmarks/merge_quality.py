"""Evict, merge, both, calibrated: exact answers at equal true bytes, in the real engine.

    python benchmarks/merge_quality.py --out benchmarks/results/merge_quality.json

Runs on the CPU, one engine a configuration, each in a process of its own; ratios are asked for
per request. `calibrated` is what `vllm-spindle calibrate` writes for a ratio, from questions of
other keys; where that is a configuration that already ran, its figures are shared.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RATIOS = (0.5, 0.3, 0.2, 0.15)
SEED = 123
MODES: dict[str, dict[str, Any]] = {
    "evict": {},
    "evict, heads alike": {"budget": "uniform"},
    "merge": {"method": "merge"},
    "both": {"method": "both"},
    "evict, a band a layer": {"num_bands": 6, "budget": "uniform"},
    "merge layer 0, evict the rest": {"band_methods": ["merge"] + ["evict"] * 5},
}


def ask(model: str, config: dict[str, Any], ratios: list[float], args: dict[str, int]) -> list[Any]:
    """Exact answers per ratio, one engine for all of them."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    from vllm import LLM, SamplingParams

    from vllm_spindle.evaluation.needle import MAX_NEW_TOKENS, is_exact, make_questions

    questions = make_questions(args["questions"], args["prompt_len"], seed=SEED)
    llm = LLM(
        model,
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        block_size=32,
        enable_prefix_caching=False,
        disable_log_stats=True,
        additional_config={"spindle": {"keep_ratio": min(ratios), **config}},
    )
    rows = []
    for ratio in ratios:
        own = {"spindle_keep_ratio": ratio}
        sampling = SamplingParams(max_tokens=MAX_NEW_TOKENS, temperature=0, extra_args=own)
        started = time.perf_counter()
        outputs = llm.generate([q.prompt for q in questions], sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        exact = sum(
            is_exact(output.outputs[0].text, question)
            for output, question in zip(outputs, questions, strict=True)
        )
        rows.append({"ratio": ratio, "exact": exact / len(questions), "seconds": seconds})
    return rows


def calibrated(model: str, ratio: float, prompt_len: int) -> dict[str, Any]:
    """What calibration chooses for a ratio."""
    import yaml

    with tempfile.NamedTemporaryFile(suffix=".yaml") as plan:
        command = ["-m", "vllm_spindle.cli", "calibrate", model, "--keep-ratio", str(ratio)]
        command += ["--prompt-len", str(prompt_len), "--num-prompts", "4", "--out", plan.name]
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        config = yaml.safe_load(plan.read())
    names = ("budget", "num_bands", "band_methods", "key_share", "theta_key", "theta_value")
    return {name: config[name] for name in names if name in config}


def in_child(*arguments: Any) -> list[Any]:
    """``ask`` in a fresh process, which gives its memory back."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(ask, *arguments).result()


def true_ratio(model: str, config: dict[str, Any], ratio: float, prompt_len: int) -> float:
    """Bytes held over the prompt's, padding included."""
    from vllm_spindle.commands.geometry import read_geometry
    from vllm_spindle.commands.plan import make_report
    from vllm_spindle.config import load_config, with_profile
    from vllm_spindle.policy import SpindlePolicy

    geometry = read_geometry(model)
    options = with_profile(load_config({**config, "keep_ratio": ratio}), model)
    policy = SpindlePolicy(options, geometry.num_layers, 32, geometry.num_queries_per_kv)
    return float(make_report(policy, geometry, prompt_len)["true_ratio"])


def is_same(config: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two configurations evict everywhere, by the same budgets in as many bands."""

    def of(each: dict[str, Any]) -> tuple[set[str], str, int | None]:
        methods = each.get("band_methods") or [each.get("method", "evict")]
        bands = each.get("num_bands") or (len(methods) if each.get("band_methods") else None)
        return set(methods), each.get("budget", "auto"), bands

    return of(config) == of(other) and of(config)[0] == {"evict"}


def main() -> int:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/needle")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--prompt-len", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    counts = {"questions": args.questions, "prompt_len": args.prompt_len}
    found: dict[str, dict[str, Any]] = {}
    for name, config in MODES.items():
        rows = in_child(args.model, config, list(RATIOS), counts)
        found[name] = {"config": config, "rows": rows}
        report(args, counts, found)
    rows = []
    for ratio in RATIOS:
        config = calibrated(args.model, ratio, args.prompt_len)
        twin = next((n for n, mode in found.items() if is_same(mode["config"], config)), None)
        if twin is None:
            row = in_child(args.model, config, [ratio], counts)[0]
        else:
            row = next(row for row in found[twin]["rows"] if row["ratio"] == ratio)
        rows.append({**row, "config": config, "same_as": twin})
        report(args, counts, {**found, "calibrated": {"rows": rows}})
    return 0


def report(
    args: argparse.Namespace, counts: dict[str, int], found: dict[str, dict[str, Any]]
) -> None:
    """Print and write what there is so far: the machine may be wanted back."""
    from vllm_spindle.bench.provenance import provenance

    for mode in found.values():
        for row in mode["rows"]:
            config = row.get("config", mode.get("config"))
            row["true_ratio"] = true_ratio(args.model, config, row["ratio"], args.prompt_len)
    print("| exact answers at true bytes | " + " | ".join(f"{r:.0%}" for r in RATIOS) + " |")
    print("|---|" + "---|" * len(RATIOS))
    for name, mode in found.items():
        figures = [f"{row['exact']:.1%}" for row in mode["rows"]]
        print(f"| {name} | " + " | ".join(figures) + " |", flush=True)
    if args.out:
        whole = {"model": args.model, **counts, "seed": SEED, "modes": found, "made": provenance()}
        args.out.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
