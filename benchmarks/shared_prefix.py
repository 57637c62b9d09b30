"""Prefix caching under spindle: hits, time to first token and capacity on a shared system prompt.

    OMP_NUM_THREADS=1 python benchmarks/shared_prefix.py --out FILE

Four sides in one process, one after the other, same KV memory: stock and spindle (keep 0.25), each
with prefix caching and without. All requests arrive at once. Times are of one run; counts repeat.
"""

import argparse
import gc
import json
import os
import time
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING")
os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")

MODEL = "models/needle"
NUM_REQUESTS, SHARED, OWN, OUTPUT = 64, 1000, 500, 32


def prompts() -> list[list[int]]:
    """One shared start, an end of each request's own."""
    from vllm_spindle.evaluation import needle

    texts = [needle.make_questions(1, SHARED + OWN, seed=s)[0].prompt for s in range(65)]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = [tokenizer.encode(text) for text in texts]
    return [ids[0][:SHARED] + other[SHARED:] for other in ids[1:]]


def run(asks: list[list[int]], spindle: dict[str, Any] | None, caching: bool) -> dict[str, Any]:
    """One side."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.sampling_params import RequestOutputKind

    section = {} if spindle is None else {"additional_config": {"spindle": spindle}}
    llm = LLM(
        MODEL,
        enforce_eager=True,
        block_size=32,
        kv_cache_memory_bytes=16 << 20,
        enable_prefix_caching=caching,
        max_num_batched_tokens=2048,
        **section,
    )
    engine = llm.llm_engine
    params = SamplingParams(
        temperature=0,
        max_tokens=OUTPUT,
        ignore_eos=True,
        output_kind=RequestOutputKind.CUMULATIVE,
    )
    engine.add_request("warm-up", {"prompt_token_ids": asks[0][::-1]}, params)
    while engine.has_unfinished_requests():
        engine.step()
    start, first, cached, peak = time.perf_counter(), {}, 0, 0
    for i, ask in enumerate(asks):
        engine.add_request(str(i), {"prompt_token_ids": ask}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.outputs[0].token_ids:
                first.setdefault(output.request_id, time.perf_counter() - start)
            if output.finished:
                cached += output.num_cached_tokens or 0
        peak = max(peak, len(engine.engine_core.engine_core.scheduler.running))
    seconds = time.perf_counter() - start
    vars(llm).clear()
    del llm, engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return {
        "hit_tokens": cached,
        "peak_running": peak,
        "mean_seconds_to_first_token": sum(first.values()) / len(first),
        "seconds": seconds,
    }


def main() -> None:
    """Every side, and the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    import torch

    from vllm_spindle.bench.provenance import provenance

    torch.set_num_threads(1)
    asks = prompts()
    keep = {"keep_ratio": 0.25}
    sides = {
        "stock, cache": run(asks, None, True),
        "stock, no cache": run(asks, None, False),
        "keep 0.25, cache": run(asks, keep, True),
        "keep 0.25, no cache": run(asks, keep, False),
        "keep 0.25 uniform, cache": run(asks, {**keep, "budget": "uniform"}, True),
    }
    settings = {"model": MODEL, "requests": NUM_REQUESTS, "shared": SHARED, "own": OWN,
                "output": OUTPUT, "kv_cache_mib": 16, "block_size": 32}  # fmt: skip
    report = {"sides": sides, "settings": settings, "provenance": provenance()}
    with open(args.out, "w", encoding="utf-8") as file:
        json.dump(report, file, indent=2)
    for name, side in sides.items():
        print(f"{name:26s}", {k: round(v, 3) for k, v in side.items()})


if __name__ == "__main__":
    main()
