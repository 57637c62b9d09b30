"""What a reduced cache costs on natural text: KL to full and perplexity, every method, equal bytes.

    OMP_NUM_THREADS=1 python benchmarks/text_quality.py --out benchmarks/results/text_quality.json

Offline, no vLLM. Prompts are of held-out files of Python's standard library; what follows them is
given to the model token by token (teacher forcing) and every token is predicted from the reduced
cache. Beside the methods of ``vllm-spindle eval``: SpindleKV without the model's profile, and what
its bands can do instead of evicting (merge, both), without a profile too.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_spindle.baselines import ABLATIONS, METHODS, make_method
from vllm_spindle.baselines.base import Method
from vllm_spindle.baselines.spindle import Spindle
from vllm_spindle.bench.provenance import provenance
from vllm_spindle.evaluation.bootstrap import Interval, difference_interval, mean_interval
from vllm_spindle.evaluation.passages import (
    KINDS,
    Passage,
    divergence,
    loss,
    make_passages,
    next_log_probs,
)
from vllm_spindle.evaluation.source import tokenized_files

FULL, OURS = "full", "spindle"
OTHERS: dict[str, dict[str, Any]] = {
    "merge": {"method": "merge"},
    "both": {"method": "both"},
}
DEFAULT_METHODS = (*METHODS, "spindle_uniform")
PROMPT_TOKENS = (768, 1024)
NUM_NEXT = 64


@dataclass
class Cell:
    """A method at a budget on one kind of continuation; one value a passage.

    Attributes:
        kl: to full, nats a token.
        nats: loss of the true continuation, nats a token.
        shares: true bytes over full ones.
    """

    kl: list[float] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)


Cells = dict[tuple[str, str, float], Cell]  # kind, method, budget


def method_of(name: str, model: Any) -> Method:
    """A method by its name here, with the profile beside the model if it takes one."""
    if name in OTHERS:
        return make_method(OURS, budget="uniform", **OTHERS[name])
    method = make_method(name)
    return method.of_model(model.config._name_or_path) if isinstance(method, Spindle) else method


def measure(
    model: Any, passages: Sequence[tuple[str, Passage]], names: Sequence[str], budgets: list[float]
) -> Cells:
    """Every method at every budget on every passage."""
    import torch
    from rich.console import Console
    from rich.progress import track

    from vllm_spindle.hf import read

    methods = {name: method_of(name, model) for name in names}
    cells: Cells = {}
    console = Console(stderr=True)
    for kind, passage in track(passages, "passages", console=console):
        prompt = torch.tensor([passage.prompt_ids])
        plain = read(model, prompt)
        full, _ = next_log_probs(model, passage, plain, make_method(FULL), 1.0)
        for name, method in methods.items():
            layers = plain
            if method.reads_twice or method.reads_ahead:
                layers = read(model, prompt, twice=method.reads_twice, ahead=method.reads_ahead)
            for budget in budgets:
                found, share = next_log_probs(model, passage, layers, method, budget)
                cell = cells.setdefault((kind, name, budget), Cell())
                cell.kl.append(divergence(full, found))
                cell.nats.append(loss(found, passage.next_ids))
                cell.shares.append(share)
    return cells


def rows(cells: Cells) -> Iterator[dict[str, Any]]:
    """A row a cell: means with their intervals, and by how much it is above SpindleKV."""
    for (kind, name, budget), cell in cells.items():
        nats = mean_interval([cell.nats])
        row = {
            "kind": kind,
            "method": name,
            "budget": budget,
            "bytes": round(sum(cell.shares) / len(cell.shares), 4),
            "kl": _json(mean_interval([cell.kl])),
            "perplexity": _json(Interval(*(math.exp(x) for x in (nats.mean, nats.low, nats.high)))),
        }
        ours = cells.get((kind, OURS, budget))
        if ours is not None and name != OURS:
            row["kl_above_spindle"] = _json(difference_interval([cell.kl], [ours.kl]))
        yield row


def _json(interval: Interval) -> dict[str, float]:
    return {name: round(value, 5) for name, value in asdict(interval).items()}


def table(found: Sequence[dict[str, Any]], kind: str, names: Sequence[str]) -> str:
    """KL and perplexity, a row a method, a column a budget."""
    mine = [row for row in found if row["kind"] == kind]
    budgets = list(dict.fromkeys(row["budget"] for row in mine))
    lines = [
        f"| {kind} | " + " | ".join(f"KL at {100 * b:g} % | perplexity" for b in budgets) + " |",
        "|---|" + "---:|" * (2 * len(budgets)),
    ]
    for name in names:
        cells = []
        for row in (row for row in mine if row["method"] == name):
            kl = row["kl"]
            cells.append(f"{kl['mean']:.3f} ({kl['low']:.3f} to {kl['high']:.3f})")
            cells.append(f"{row['perplexity']['mean']:.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/text")
    parser.add_argument("--methods", default=",".join(DEFAULT_METHODS))
    parser.add_argument("--budgets", default="0.5,0.25,0.15")
    parser.add_argument("--num-prompts", type=int, default=24, help="of each kind, each seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    names, budgets = args.methods.split(","), [float(text) for text in args.budgets.split(",")]
    if unknown := set(names) - {*METHODS, *ABLATIONS, *OTHERS}:
        parser.error(f"--methods: no method {', '.join(sorted(unknown))}")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vllm_spindle.hf import enable

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    enable(model)
    files = tokenized_files(tokenizer, held_out=True)
    passages = [
        (kind, passage)
        for kind in KINDS
        for seed in range(args.seeds)
        for passage in make_passages(
            files,
            kind,
            args.num_prompts,
            prompt_tokens=PROMPT_TOKENS,
            num_next=NUM_NEXT,
            bos=tokenizer.bos_token_id,
            seed=seed,
        )
    ]
    found = list(rows(measure(model, passages, names, budgets)))
    for kind in KINDS:
        print(table(found, kind, names) + "\n")
    if args.out:
        whole = {
            "model": args.model,
            "prompt_tokens": PROMPT_TOKENS,
            "next_tokens": NUM_NEXT,
            "prompts_of_each_kind": args.num_prompts * args.seeds,
            "seeds": args.seeds,
            "rows": found,
            "made": provenance(),
        }
        args.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
