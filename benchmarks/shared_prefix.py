"""Prefix caching under spindle: hits, time to first token and capacity on a shared system prompt.

    OMP_NUM_THREADS=1 python benchmarks/shared_prefix.py --out FILE [--traffic chats] [--sides ...]

All sides in one process, one after the other, same KV memory: stock and spindle (keep 0.25), each
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
NUM_CHATS, TURNS, SYSTEM, TURN = 32, 6, 400, 150


def words(seed: int, length: int) -> list[int]:
    """Tokens of a needle prompt."""
    from transformers import AutoTokenizer

    from vllm_spindle.evaluation import needle

    text = needle.make_questions(1, max(length, 256), seed=seed)[0].prompt
    return AutoTokenizer.from_pretrained(MODEL).encode(text)[:length]


def shared() -> list[list[list[int]]]:
    """One shared start, an end of each request's own; one turn each."""
    start = words(0, SHARED)
    return [[start + words(1 + i, OWN)] for i in range(NUM_REQUESTS)]


def chats() -> list[list[list[int]]]:
    """A system prompt that all share, and turns of each chat's own."""
    system = words(0, SYSTEM)
    return [
        [
            (system if turn == 0 else []) + words(1 + chat * TURNS + turn, TURN)
            for turn in range(TURNS)
        ]
        for chat in range(NUM_CHATS)
    ]


def run(
    conversations: list[list[list[int]]], spindle: dict[str, Any] | None, caching: bool
) -> dict[str, Any]:
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
    engine.add_request("warm-up", {"prompt_token_ids": conversations[0][0][::-1]}, params)
    while engine.has_unfinished_requests():
        engine.step()
    measured = serve(engine, conversations, params)
    vars(llm).clear()
    del llm, engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return measured


def serve(engine: Any, conversations: list[list[list[int]]], params: Any) -> dict[str, Any]:
    """Every conversation at once, turn after turn, each turn upon the answers before it."""
    begun, first, cached, peak = {}, [], 0, 0
    prompts = {str(i): list(turns[0]) for i, turns in enumerate(conversations)}
    turn = dict.fromkeys(prompts, 0)
    start = time.perf_counter()

    def ask(name: str) -> None:
        begun[name] = time.perf_counter()
        engine.add_request(f"{name}.{turn[name]}", {"prompt_token_ids": prompts[name]}, params)

    for name in prompts:
        ask(name)
    while engine.has_unfinished_requests():
        for output in engine.step():
            name = output.request_id.partition(".")[0]
            answer = list(output.outputs[0].token_ids)
            if answer and name in begun:
                first.append(time.perf_counter() - begun.pop(name))
            if output.finished:
                cached += output.num_cached_tokens or 0
                turn[name] += 1
                turns = conversations[int(name)]
                if turn[name] < len(turns):
                    prompts[name] = prompts[name] + answer + turns[turn[name]]
                    ask(name)
        peak = max(peak, len(engine.engine_core.engine_core.scheduler.running))
    return {
        "hit_tokens": cached,
        "peak_running": peak,
        "mean_seconds_to_first_token": sum(first) / len(first),
        "seconds": time.perf_counter() - start,
    }


def compare(
    conversations: list[list[list[int]]], prefix: int, only: list[str] | None
) -> dict[str, Any]:
    """Every side of one kind of traffic, or some."""
    keep = {"keep_ratio": 0.25}
    named = {**keep, "protected_prefix_tokens": prefix}
    alike = {**named, "budget": "uniform"}
    auto = {**keep, "protected_prefix_tokens": "auto"}
    sides = {
        "stock, cache": (None, True),
        "stock, no cache": (None, False),
        "keep 0.25, cache": (keep, True),
        "keep 0.25, no cache": (keep, False),
        "keep 0.25, prefix named, cache": (named, True),
        "keep 0.25, prefix named, no cache": (named, False),
        "keep 0.25, uniform, prefix named, cache": (alike, True),
        "keep 0.25, uniform, prefix named, no cache": (alike, False),
        "keep 0.25, prefix found, cache": (auto, True),
    }
    return {
        name: run(conversations, *side)
        for name, side in sides.items()
        if only is None or name in only
    }


def main() -> None:
    """Every side, and the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--traffic", nargs="+", default=["shared prefix", "chats"])
    parser.add_argument("--sides", nargs="+", help="by their names in the report; default: all")
    args = parser.parse_args()
    import torch

    from vllm_spindle.bench.provenance import provenance

    torch.set_num_threads(1)
    traffic = {"shared prefix": (shared(), SHARED), "chats": (chats(), SYSTEM)}
    sides = {name: compare(*traffic[name], args.sides) for name in args.traffic}
    settings = {"model": MODEL, "requests": NUM_REQUESTS, "shared": SHARED, "own": OWN,
                "chats": NUM_CHATS, "turns": TURNS, "system": SYSTEM, "turn": TURN,
                "output": OUTPUT, "kv_cache_mib": 16, "block_size": 32}  # fmt: skip
    report = {"sides": sides, "settings": settings, "provenance": provenance()}
    with open(args.out, "w", encoding="utf-8") as file:
        json.dump(report, file, indent=2)
    for name, compared in sides.items():
        print(name)
        for side, figures in compared.items():
            print(f"  {side:38s}", {k: round(v, 3) for k, v in figures.items()})


if __name__ == "__main__":
    main()
