"""Checks on a GPU, one engine after the other: what the CPU tests prove, once more where it counts.

Assumes: vLLM, this repository's packages with their entry points, and ``tests`` on PYTHONPATH.
Command: ``python benchmarks/gpu_checks.py --json FILE`` (``--eager`` on a CPU, where it runs, too).
A random-weight model, so that every answer is as hard as any. Exit code 1 if a check fails.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 1 << 20
EVICT = {"keep_ratio": 0.25}
BOTH = {"keep_ratio": 0.5, "method": "both"}
# Of graphs; the model is small, and capturing vLLM's fifty sizes takes longer than it runs.
CAPTURE_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
# 257 and 513 end in a chunk of one token, beside decodes: a FULL graph where there are graphs.
CHUNK = 256
PROMPT_LENS = [500, 257, 95, 513, 1200]
# Head size, query heads per kv head, kv heads, type.
SHAPES = [
    (64, 4, 2, "bfloat16"),
    (96, 1, 3, "float16"),
    (128, 7, 1, "bfloat16"),
    (256, 2, 2, "bfloat16"),
    (64, 2, 2, "float32"),
]
SCORE_ERROR = 1e-3  # relative to the largest; torch on a GPU may round its products to tf32
SAME_ENOUGH = 0.5  # of answers: rounding differs between kernels, a stale buffer spares none


def main() -> int:
    """Run the checks that were asked for, print a line each, write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(CHECKS), help="names, comma between them")
    parser.add_argument("--num-requests", type=int, default=10_000, help="of the last check")
    parser.add_argument("--eager", action="store_true", help="no graphs, no compilation")
    parser.add_argument("--attention-backend", help="as vLLM's flag")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import tiny

    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        tiny.write_llama(Path(folder), head_size=64)
        for name in args.only.split(","):
            started = time.perf_counter()
            try:
                found = CHECKS[name](Bench(folder, args))
            except Exception as error:  # the other checks may say why
                traceback.print_exc()
                found = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
            report[name] = {**found, "seconds": time.perf_counter() - started}
            print(f"{'ok  ' if found['ok'] else 'FAIL'} {name}: {found}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if all(found["ok"] for found in report.values()) else 1


class Bench:
    """Engines of one model with the same flags."""

    def __init__(self, model: str, args: argparse.Namespace) -> None:
        """Args: model: its folder; args: the command line."""
        self._model = model
        self.num_requests = args.num_requests
        self._options: dict[str, Any] = {"enforce_eager": args.eager, "max_model_len": 2048}
        if not args.eager:
            self._options["compilation_config"] = {"cudagraph_capture_sizes": CAPTURE_SIZES}
            # What an engine before it has left must not be missed.
            self._options["gpu_memory_utilization"] = 0.5
        if args.attention_backend:
            self._options["attention_backend"] = args.attention_backend

    def engine(self, spindle: dict[str, Any] | None, **options: Any) -> Any:
        """A context with the engine."""
        from engine_probe.engines import engine

        return engine(self._model, spindle, **{**self._options, **options})

    def answers(
        self, spindle: dict[str, Any] | None, **options: Any
    ) -> tuple[list[list[int]], dict[str, Any]]:
        """Tokens of a mixed batch in chunks, and what the watch saw of a reduced one."""
        import tiny
        from engine_probe.engines import Ask
        from engine_probe.plan_watch import PlanWatch

        prompts = [each["prompt_token_ids"] for each in tiny.prompts(20, PROMPT_LENS, seed=1)]
        asks = [Ask(prompt, max_tokens=8 + 4 * (i % 5)) for i, prompt in enumerate(prompts)]
        with self.engine(spindle, **options) as running:
            running.chunk(CHUNK)
            if spindle is None or spindle["keep_ratio"] == 1:
                return running.run(asks), {}
            with PlanWatch(running) as watch:
                tokens = running.run(asks)
            return tokens, watch.report()


def off_is_stock(bench: Bench) -> dict[str, Any]:
    """keep_ratio 1.0 against no plugin: token for token."""
    stock, _ = bench.answers(None)
    off, _ = bench.answers({"keep_ratio": 1.0})
    return {"ok": stock == off, "answers": len(stock)}


def _heads() -> dict[str, Any]:
    """Every kv head has blocks of its own, by a profile of no model."""
    import tiny

    shares = tiny.head_shares(num_layers=6, num_heads=2)
    return {**EVICT, "budget": "measured", "head_shares": shares}


def _plan_is_exact(options: Callable[[], dict[str, Any]]) -> Callable[[Bench], dict[str, Any]]:
    def check(bench: Bench) -> dict[str, Any]:
        """The plan at every step; the answers are those of an engine without graphs."""
        spindle = options()
        tokens, report = bench.answers(spindle)
        eager, _ = bench.answers(spindle, enforce_eager=True)
        same = sum(a == b for a, b in zip(tokens, eager, strict=True)) / len(tokens)
        held = not report["problems"] and report["idle_free"] and not report["left_over"]
        return {"ok": held and same >= SAME_ENOUGH, "same_as_eager": same, **report}

    return check


def reduction_kernels(bench: Bench) -> dict[str, Any]:
    """Scoring, ranking, compaction, of all head sizes and types: as torch, and as the CPU."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"device": device, "block_size": 16, "keep_ratio": 0.25, "repeats": 1, "seed": 1}
    options["num_layers"] = 2
    names = ("head_size", "group", "num_kv_heads", "dtype")
    options["shapes"] = [dict(zip(names, shape, strict=True)) for shape in SHAPES]
    options["contexts"] = [200, 3000] if device == "cuda" else [100]
    child = subprocess.run(
        [sys.executable, "-m", "vllm_spindle.bench.gpu_reduction"],
        input=json.dumps(options),
        capture_output=True,
        text=True,
        env={**os.environ, **({"TRITON_INTERPRET": "1"} if device == "cpu" else {})},
    )
    lines = [line for line in child.stdout.splitlines() if line.startswith("result ")]
    if child.returncode or not lines:
        return {"ok": False, "log": child.stderr[-2000:]}
    results = json.loads(lines[-1].removeprefix("result "))["reductions"]
    worst = max(each["score_error"] for each in results)
    right = {name: all(each[name] for each in results) for name in ("is_ranked", "is_moved")}
    return {"ok": all(right.values()) and worst < SCORE_ERROR, "score_error": worst, **right}


def aborts(bench: Bench) -> dict[str, Any]:
    """Thousands of requests, a third of them aborted at any moment, in little memory."""
    import tiny
    from engine_probe.engines import Ask

    rng = random.Random(3)
    with bench.engine(EVICT, kv_cache_memory_bytes=48 * MIB, max_num_seqs=64) as running:
        lengths = [rng.randrange(1, 900) for _ in range(64)]
        prompts = [each["prompt_token_ids"] for each in tiny.prompts(64, lengths, seed=4)]
        requests, added, aborted, most = running.scheduler.requests, 0, 0, 0
        while added < bench.num_requests or running.engine.has_unfinished_requests():
            while added < bench.num_requests and len(requests) < 96:
                ratio = rng.choice([None, None, 0.1, 0.5, 1.0])
                ask = Ask(rng.choice(prompts), rng.randrange(1, 24), keep_ratio=ratio)
                running.add(f"r{added}", ask)
                added += 1
            running.step()
            most = max(most, len(running.scheduler.running))
            while requests and rng.random() < 0.6:
                victim = rng.choice(list(requests.values()))
                running.engine.abort_request([victim.request_id], internal=True)
                aborted += 1
        for _ in range(3):
            running.step()
        worker = running.core.model_executor.driver_worker.worker
        left = worker._reduction.reducer.holders()
        return {
            "ok": running.is_idle_and_free and not left,
            "requests": added,
            "aborted": aborted,
            "most_running": most,
            "left_over": left[:5],
        }


CHECKS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "reduction-kernels": reduction_kernels,
    "off-is-stock": off_is_stock,
    "plan-evict": _plan_is_exact(lambda: EVICT),
    "plan-heads": _plan_is_exact(_heads),
    "plan-codebooks": _plan_is_exact(lambda: BOTH),
    "aborts": aborts,
}


if __name__ == "__main__":
    sys.exit(main())
