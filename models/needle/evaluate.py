"""Exact-match of the needle model on held-out questions, full KV cache.

    .venv/bin/python models/needle/evaluate.py --model models/needle

Prints a table: one row per prompt length, one column per dtype. Answers are generated greedily with
a KV cache; an answer counts only if every word of it is right and ``</s>`` comes right after.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from vllm_spindle.evaluation import needle

PROMPT_TOKENS = (256, 512, 1024, 2048)
MAX_BATCH_TOKENS = 16384
SEED = 1_000_003


@torch.inference_mode()
def generate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> list[str]:
    """Greedy continuations of equally long prompts, in one batch, cut at ``</s>``.

    A continuation without ``</s>`` within ``MAX_NEW_TOKENS`` comes back whole, so it is too long.
    """
    ids = torch.tensor(tokenizer(prompts).input_ids)  # [B, T]: no padding, all are equally long
    cache, generated = None, []
    for _ in range(needle.MAX_NEW_TOKENS):
        step = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = step.past_key_values, step.logits[:, -1:].argmax(-1)
        generated.append(ids)
    rows = torch.cat(generated, dim=1).tolist()
    ends = [
        row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else None for row in rows
    ]
    return [tokenizer.decode(row[:end]) for row, end in zip(rows, ends, strict=True)]


def exact_ratio(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[needle.NeedleQuestion],
) -> float:
    """Share of ``questions`` answered exactly. [0, 1]."""
    num_exact = 0
    batch_size = max(1, MAX_BATCH_TOKENS // questions[0].num_prompt_tokens)
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        texts = generate(model, tokenizer, [question.prompt for question in batch])
        num_exact += sum(map(needle.is_exact, texts, batch))
        print(f"\r{num_exact} of {start + len(batch)} exact", end="", flush=True)
    print("\r", end="")
    return num_exact / len(questions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).parent)
    parser.add_argument("--num-questions", type=int, default=400, help="for each length")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--prompt-tokens", nargs="+", type=int, default=PROMPT_TOKENS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    models = [
        LlamaForCausalLM.from_pretrained(args.model, dtype=getattr(torch, dtype)).eval()
        for dtype in args.dtypes
    ]
    print("| prompt tokens | " + " | ".join(f"{dtype}, exact %" for dtype in args.dtypes) + " |")
    print("|---" * (1 + len(models)) + "|")
    for num_tokens in args.prompt_tokens:
        questions = needle.make_questions(args.num_questions, num_tokens, seed=SEED)
        ratios = [exact_ratio(model, tokenizer, questions) for model in models]
        cells = " | ".join(f"{100 * ratio:.2f}" for ratio in ratios)
        print(f"| {num_tokens} | {cells} |" + " " * 20, flush=True)


if __name__ == "__main__":
    main()
