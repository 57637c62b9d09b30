"""How long an engine step takes while prompts are merged: `reduce_share` against a busy batch.

    python benchmarks/bounded_steps.py --json benchmarks/results/bounded_steps.json

Eight requests decode; then prompts come in, one after the other, and each is reduced to codebooks.
A row a share: the longest step of those that reduce, for which every decoding request waits; the
longest reduction of a step; the longest step without one. One engine a row, each in a process of
its own, all in this run.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

SHARES = (1.0, 0.5, 0.25, 0.125, 1 / 16)
NUM_DECODING = 8


def serve(model: str, spindle: dict[str, Any], counts: dict[str, int]) -> dict[str, Any]:
    """Seconds of the steps while the prompts come in, and what of them was reduction."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1",
    }
    import numpy as np
    import torch
    from vllm import LLM, SamplingParams

    from vllm_spindle.engine.reduction import Reducer

    torch.set_num_threads(1)
    llm = LLM(
        model,
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        block_size=32,
        max_num_batched_tokens=counts["chunk"],
        enable_prefix_caching=False,
        disable_log_stats=True,
        skip_tokenizer_init=True,
        additional_config={"spindle": spindle},
    )
    generator = np.random.default_rng(0)
    vocab_size = llm.llm_engine.model_config.get_vocab_size()
    reducing: list[float] = []
    stock = Reducer.reduce

    def timed(self: Reducer, *args: Any, **kwargs: Any) -> None:
        started = time.perf_counter()
        stock(self, *args, **kwargs)
        reducing[-1] += time.perf_counter() - started

    def enqueue(prompt_len: int, max_tokens: int) -> None:
        tokens = generator.integers(0, vocab_size, prompt_len).tolist()
        params = SamplingParams(
            max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        llm.enqueue([{"prompt_token_ids": tokens}], params, use_tqdm=False)

    def step() -> float:
        reducing.append(0)
        started = time.perf_counter()
        llm.llm_engine.step()
        return time.perf_counter() - started

    Reducer.reduce = timed  # type: ignore[method-assign]
    for _ in range(NUM_DECODING):
        enqueue(200, 500)
    enqueue(counts["prompt_len"], 4)  # warm-up: first calls
    for _ in range(80):
        step()
    reducing.clear()
    steps: list[float] = []
    for _ in range(counts["prompts"]):
        enqueue(counts["prompt_len"], 4)  # who ends with its first token is not reduced to the end
        steps += [step() for _ in range(30)]
    assert llm.llm_engine.get_num_unfinished_requests() == NUM_DECODING, "decoders must be there"
    pairs = list(zip(steps, reducing, strict=True))
    merging = [(whole, part) for whole, part in pairs if part]
    return {
        "steps_that_reduce": len(merging),
        "longest_step_s": max(whole for whole, _ in merging),
        "longest_reduction_s": max(part for _, part in merging),
        "reduction_s": sum(part for _, part in merging),
        "longest_step_without_s": max(whole for whole, part in pairs if not part),
        "median_step_s": median(steps),
    }


def main() -> int:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/needle")
    parser.add_argument("--method", default="both", help="evict | merge | both")
    parser.add_argument("--prompt-len", type=int, default=1500)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=512, help="max_num_batched_tokens")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    counts = {"prompt_len": args.prompt_len, "prompts": args.prompts, "chunk": args.chunk}
    rows = []
    print("| reduce_share | steps that reduce | longest, ms | longest reduction | without |")
    print("|---:|---:|---:|---:|---:|")
    for share in SHARES:
        spindle = {"keep_ratio": 0.25, "method": args.method, "reduce_share": share}
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            row = pool.submit(serve, args.model, spindle, counts).result()
        rows.append({"spindle": spindle, **row})
        times = (row["longest_step_s"], row["longest_reduction_s"], row["longest_step_without_s"])
        longest, part, without = (f"{1e3 * each:.0f}" for each in times)
        print(
            f"| {share:.3g} | {row['steps_that_reduce']} | {longest} | {part} | {without} |",
            flush=True,
        )
    if args.json:
        from vllm_spindle.bench.provenance import provenance

        whole = {"model": args.model, **counts, "rows": rows, "made": provenance()}
        args.json.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
