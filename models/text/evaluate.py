"""The gates of the text model, on held-out files; or prompts to measure a profile on.

    .venv/bin/python models/text/evaluate.py --model models/text
    .venv/bin/python models/text/evaluate.py --model models/text --write-prompts build/text.jsonl

A profile is measured on files that the model was trained on, so that no measured prompt is in it.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from vllm_spindle.evaluation.bootstrap import difference_interval, mean_interval
from vllm_spindle.evaluation.passages import KINDS, Passage, make_passages
from vllm_spindle.evaluation.source import tokenized_files
from vllm_spindle.evaluation.text_gates import measure_gates

PROMPT_TOKENS = (960, 1024)
NUM_NEXT = 64
SEED = 1_000_003
PROFILE_SEED = 2_000_003


def passages_of(
    tokenizer: PreTrainedTokenizerBase, kind: str, count: int, *, held_out: bool, seed: int
) -> list[Passage]:
    """Passages of held-out or of trained files."""
    return make_passages(
        tokenized_files(tokenizer, held_out=held_out),
        kind,
        count,
        prompt_tokens=PROMPT_TOKENS,
        num_next=NUM_NEXT,
        bos=tokenizer.bos_token_id,
        seed=seed,
    )


def write_prompts(tokenizer: PreTrainedTokenizerBase, count: int, path: Path) -> None:
    """For ``vllm-spindle profile --prompts``: the kinds in turn."""
    of_kinds = [
        passages_of(tokenizer, kind, count // len(KINDS), held_out=False, seed=PROFILE_SEED)
        for kind in KINDS
    ]
    lines = [
        json.dumps({"prompt_token_ids": passage.prompt_ids})
        for passages in zip(*of_kinds, strict=True)
        for passage in passages
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/text")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--num-passages", type=int, default=38, help="of each kind")
    parser.add_argument("--write-prompts", type=Path, help="write these and measure nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.write_prompts:
        return write_prompts(tokenizer, args.num_passages, args.write_prompts)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
    natural, repeated = (
        passages_of(tokenizer, kind, args.num_passages, held_out=True, seed=SEED) for kind in KINDS
    )
    gates = measure_gates(model, natural, repeated)
    whole = [*gates.long, *gates.second]
    for name, ours, others in (
        ("natural: 64 tokens of context, all of it", gates.short, gates.long),
        ("repeated: said first, said again", gates.first, gates.second),
        ("both: random eviction to 25 %, all of it", gates.random, whole),
    ):
        means = [mean_interval([values]).mean for values in (ours, others)]
        less = difference_interval([ours], [others])
        print(
            f"{name}: perplexity {math.exp(means[0]):.2f}, {math.exp(means[1]):.2f}; "
            f"nats {less.mean:.3f} less ({less.low:.3f} to {less.high:.3f})"
        )
    lost = mean_interval([gates.random_divergence])
    print(f"KL of random eviction to full: {lost.mean:.3f} ({lost.low:.3f} to {lost.high:.3f})")


if __name__ == "__main__":
    main()
