"""Our baselines and kvpress's presses on one model and the same prompts, in one run.

    make kvpress            # once: .venv-kvpress
    python benchmarks/kvpress_side.py --out benchmarks/results/kvpress_side.json

kvpress answers in a process and an environment of its own, with the same dials: ``METHODS``. A
question in the prompt has its last token read again, so that the first token of an answer comes
from the reduced cache on both sides.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RATIOS = (0.5, 0.25, 0.15)
PROTOCOLS = ("question_last", "after_compression")
TASKS = ("multikey_1", "multikey_2", "multikey_3")
SEED = 7
WINDOW, KERNEL = 32, 5
# Ours: name and options; theirs by the same name. kvpress's PyramidKV is SnapKV where its last
# layer's share is below the window; at 8 that is not so.
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "streaming_llm": ("streaming_llm", {}, {}),
    "snapkv": (
        "snapkv",
        {"num_recent": WINDOW, "pool_kernel": KERNEL, "pool": "avg"},
        {"window": WINDOW, "kernel": KERNEL},
    ),
    "pyramidkv": (
        "pyramidkv",
        {"num_recent": 8, "pool_kernel": KERNEL, "pool": "avg", "beta": 20},
        {"window": 8, "kernel": KERNEL},
    ),
    "expected_attention": ("expected_attention", {}, {}),
    # Not the same method: kvpress merges values into SnapKV's choice, D2O keys too into H2O's.
    "merging": ("d2o", {}, {"window": WINDOW, "kernel": KERNEL}),
}


def make_samples(tokenizer: Any, protocol: str, count: int, length: int) -> list[dict[str, Any]]:
    """Prompts to reduce, what is read behind them, and answers; token ids."""
    from vllm_spindle.evaluation.protocols import make_sample
    from vllm_spindle.evaluation.tasks import make_item
    from vllm_spindle.evaluation.tasks.words import NeedleWords

    dialect, samples = NeedleWords(), []
    for index in range(count):
        task = TASKS[index % len(TASKS)]
        item = make_item(task, dialect, prompt_tokens=length, seed=SEED, index=index)
        sample = make_sample(protocol, dialect, item, SEED)
        prompt = list(tokenizer(sample.prompt).input_ids)
        followup = list(tokenizer(sample.followups[0], add_special_tokens=False).input_ids)
        samples.append({"prompt": prompt, "followup": followup, "answer": sample.answers[0]})
    return samples


def answer_ours(
    model: Any, runs: list[dict[str, Any]], samples: list[dict[str, Any]], most: int
) -> list[dict[str, Any]]:
    """Token ids of every sample under every method, and true bytes over the prompt's."""
    from vllm_spindle.evaluation.answers import Answerer

    answered = []
    for run in runs:
        name, options, _ = METHODS[run["method"]]
        answerer = Answerer(model, method=name, byte_ratio=run["ratio"], seed=SEED, **options)
        said, kept = [], []
        for sample in samples:
            said += answerer.answer(sample["prompt"], [sample["followup"]], most, {2})
            kept.append(answerer.true_bytes / answerer.full_bytes)
        answered.append({**run, "said": said, "kept": sum(kept) / len(kept)})
        print(f"ours: {run['method']} {run['ratio']:g}", file=sys.stderr, flush=True)
    return answered


def answer_theirs(python: Path, job: dict[str, Any]) -> dict[str, Any]:
    """The same from kvpress, in a child process."""
    child = subprocess.run(
        [str(python), str(ROOT / "benchmarks" / "kvpress_child.py")],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(child.stdout))


def compare(
    ours: dict[str, Any], theirs: dict[str, Any], samples: list[dict[str, Any]], tokenizer: Any
) -> dict[str, Any]:
    """Exact answers of both sides, and the difference sample by sample with its interval."""
    from vllm_spindle.evaluation.bootstrap import difference_interval, mean_interval

    rights = []
    for side in (ours, theirs):
        texts = tokenizer.batch_decode(side["said"])
        pairs = zip(texts, samples, strict=True)
        rights.append([float(t.split() == sample["answer"].split()) for t, sample in pairs])
    same = sum(a == b for a, b in zip(ours["said"], theirs["said"], strict=True))
    gap = difference_interval([rights[0]], [rights[1]])
    return {
        "ours": mean_interval([rights[0]]).as_json(),
        "theirs": mean_interval([rights[1]]).as_json(),
        "ours_minus_theirs": gap.as_json(),
        "agree": gap.low <= 0 <= gap.high,
        "same_answers_percent": round(100 * same / len(samples), 1),
        "our_true_bytes_percent": round(100 * ours["kept"], 2),
        "their_rows_percent": round(100 * theirs["kept"], 2),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Markdown."""
    print("| | | kept | ours, % | kvpress, % | difference | same answers |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for row in rows:
        gap = row["ours_minus_theirs"]
        print(
            f"| {row['protocol']} | {row['method']} | {100 * row['ratio']:g} % | "
            f"{row['ours']['percent']:.1f} | {row['theirs']['percent']:.1f} | "
            f"{gap['percent']:+.1f} ({gap['low']:+.1f} to {gap['high']:+.1f}) | "
            f"{row['same_answers_percent']:.0f} % |"
        )


def main() -> int:
    """Measure both, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/needle")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-kvpress" / "bin" / "python")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--prompt-len", type=int, default=768)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not args.python.exists():
        print(f"{args.python} is not there: `make kvpress` makes it", file=sys.stderr)
        return 2
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from vllm_spindle.bench.provenance import provenance
    from vllm_spindle.evaluation.needle import MAX_NEW_TOKENS

    torch.set_num_threads(1)
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    runs = [{"method": m, "ratio": r, "dials": METHODS[m][2]} for m in METHODS for r in RATIOS]
    rows: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    start = time.monotonic()
    for protocol in PROTOCOLS:
        samples = make_samples(tokenizer, protocol, args.questions, args.prompt_len)
        job = {
            "model": str(Path(args.model).resolve()),
            "runs": runs,
            "samples": samples,
            "most": MAX_NEW_TOKENS,
            "stop_ids": [2],
        }
        theirs = answer_theirs(args.python, job)
        versions = theirs["versions"]
        ours = answer_ours(model, runs, samples, MAX_NEW_TOKENS)
        for mine, other in zip(ours, theirs["runs"], strict=True):
            figures = compare(mine, other, samples, tokenizer)
            rows.append(
                {"protocol": protocol, "method": mine["method"], "ratio": mine["ratio"], **figures}
            )
    print_table(rows)
    if args.out:
        whole = {
            "model": args.model,
            "questions": args.questions,
            "prompt_len": args.prompt_len,
            "tasks": TASKS,
            "seed": SEED,
            "seconds": round(time.monotonic() - start),
            "kvpress_versions": versions,
            "made": provenance(),
            "rows": rows,
        }
        args.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
