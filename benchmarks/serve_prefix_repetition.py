"""``vllm bench serve`` with its prefix_repetition data set: stock against spindle, over HTTP.

    OMP_NUM_THREADS=1 python benchmarks/serve_prefix_repetition.py --out FILE

One server after the other on the same machine, same flags, same memory, the same prompts (vLLM's
generator, one seed), all requests at once. A second pass over each server is what is reported: the
first one fills caches and compiles.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MODEL = "models/needle"
PREFIX, SUFFIX, OUTPUT, PROMPTS, PREFIXES = 1000, 400, 64, 96, 2
FLAGS = [
    "--dtype=bfloat16",
    "--enforce-eager",
    "--block-size=32",
    "--kv-cache-memory-bytes=16M",
    "--max-num-batched-tokens=2048",
    "--max-num-seqs=128",
]
SIDES: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "keep 0.25": {"keep_ratio": 0.25},
    "keep 0.25, prefix named": {"keep_ratio": 0.25, "protected_prefix_tokens": PREFIX},
    "keep 0.25, prefix found": {"keep_ratio": 0.25, "protected_prefix_tokens": "auto"},
}
KEPT = (
    "completed",
    "duration",
    "output_throughput",
    "total_token_throughput",
    "mean_ttft_ms",
    "p99_ttft_ms",
    "mean_tpot_ms",
)
HITS, QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"


def bench(url: str, folder: Path, seed: int) -> dict[str, Any]:
    """One run of vLLM's own benchmark."""
    sizes = {"prefix-len": PREFIX, "suffix-len": SUFFIX, "output-len": OUTPUT}
    flags = [f"--prefix-repetition-{name}={value}" for name, value in sizes.items()]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"),
        *(f"--base-url={url}", f"--model={MODEL}", "--dataset-name=prefix_repetition", *flags),
        *(f"--prefix-repetition-num-prefixes={PREFIXES}", f"--num-prompts={PROMPTS}"),
        *("--ignore-eos", f"--seed={seed}", "--temperature=0", "--disable-tqdm"),
        *("--save-result", f"--result-dir={folder}", "--result-filename=result.json"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return {name: result[name] for name in KEPT}


def run(name: str, spindle: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    """One side."""
    from vllm_spindle.serving.server import VllmServer

    section = [] if spindle is None else ["--additional-config", json.dumps({"spindle": spindle})]
    with VllmServer(MODEL, [*FLAGS, *section], folder / "serve.log") as server:
        bench(server.url, folder, seed=1)
        before = server.metrics()
        figures = bench(server.url, folder, seed=2)
        after = server.metrics()
    asked = after.total(QUERIES) - before.total(QUERIES)
    hits = after.total(HITS) - before.total(HITS)
    print(name, figures)
    return {**figures, "hit_share": hits / asked}


def main() -> None:
    """Every side, and the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    from vllm_spindle.bench.provenance import provenance

    with tempfile.TemporaryDirectory() as folder:
        sides = {name: run(name, spindle, Path(folder)) for name, spindle in SIDES.items()}
    settings = {"model": MODEL, "flags": FLAGS, "prefix": PREFIX, "suffix": SUFFIX,
                "output": OUTPUT, "prompts": PROMPTS, "prefixes": PREFIXES}  # fmt: skip
    report = {"sides": sides, "settings": settings, "provenance": provenance()}
    Path(args.out).write_text(json.dumps(report, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
