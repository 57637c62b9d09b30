"""Exact answers of the engine and of the transformers cache, the same questions and dials.

    python benchmarks/twin_quality.py --out benchmarks/results/twin_quality.json

Runs on the CPU, in bfloat16, one engine in a process of its own. Two implementations round
differently, so single answers may differ; the shares of exact ones may not, by more than a point.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

SEED = 321


def ask_engine(model: str, ratios: list[float], num_questions: int, prompt_len: int) -> Any:
    """Answers of a real engine, per ratio."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    from vllm_spindle.evaluation.needle import MAX_NEW_TOKENS, make_questions

    questions = make_questions(num_questions, prompt_len, seed=SEED)
    llm = LLM(
        model,
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        block_size=32,
        enable_prefix_caching=False,
        disable_log_stats=True,
        additional_config={"spindle": {"keep_ratio": min(ratios)}},
    )
    answers = []
    for ratio in ratios:
        own = {"spindle_keep_ratio": ratio}
        sampling = SamplingParams(max_tokens=MAX_NEW_TOKENS, temperature=0, extra_args=own)
        outputs = llm.generate([q.prompt for q in questions], sampling, use_tqdm=False)
        answers.append([output.outputs[0].text for output in outputs])
    return answers


def ask_transformers(model: str, ratios: list[float], num_questions: int, prompt_len: int) -> Any:
    """Answers of the transformers cache, per ratio."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vllm_spindle.config import SpindleConfig
    from vllm_spindle.evaluation.needle import MAX_NEW_TOKENS, make_questions
    from vllm_spindle.hf import SpindleCache, enable

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    enable(loaded)
    prompts = [
        torch.tensor([tokenizer(question.prompt).input_ids])
        for question in make_questions(num_questions, prompt_len, seed=SEED)
    ]

    def answer(prompt: torch.Tensor, ratio: float) -> str:
        cache = SpindleCache(loaded.config, SpindleConfig(keep_ratio=ratio), block_size=32)
        out = loaded.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )
        return tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)

    return [[answer(prompt, ratio) for prompt in prompts] for ratio in ratios]


def main() -> int:
    """Ask both, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/needle")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--prompt-len", type=int, default=1024)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.15])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from vllm_spindle.bench.provenance import provenance
    from vllm_spindle.evaluation.needle import is_exact, make_questions

    asked = (args.model, args.ratios, args.questions, args.prompt_len)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        engine = pool.submit(ask_engine, *asked).result()
    twin = ask_transformers(*asked)
    questions = make_questions(args.questions, args.prompt_len, seed=SEED)
    rows = []
    for ratio, *sides in zip(args.ratios, engine, twin, strict=True):
        shares = [sum(map(is_exact, answers, questions)) / len(questions) for answers in sides]
        same = sum(a.split() == b.split() for a, b in zip(*sides, strict=True)) / len(questions)
        rows.append({"ratio": ratio, "engine": shares[0], "transformers": shares[1], "same": same})
        print(f"{ratio:.0%}: engine {shares[0]:.1%}, transformers {shares[1]:.1%}, same {same:.1%}")
    if args.out:
        whole = {"model": args.model, "questions": args.questions, "prompt_len": args.prompt_len}
        whole |= {"seed": SEED, "rows": rows, "made": provenance()}
        args.out.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
