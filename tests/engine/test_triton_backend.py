"""vLLM's Triton attention on shifted tables, and our kernels, interpreted, on runner V2.

What CUDA will run, but for FlashAttention, with kernels that Triton's interpreter executes: ours
score prompts, move kept tokens and read codebooks; eagerly and with FULL CUDA graphs emulated.
"""

from contextlib import ExitStack
from typing import Any

import pytest

import tiny
from engine_child import in_child
from engine_probe.interpreted import ENVIRONMENT

pytestmark = pytest.mark.engine

EVICT = {"keep_ratio": 0.7, "min_prompt_len": 32, "window": 16}
WAITS = {**EVICT, "keep_ratio": 0.5, "reduce_after": 3, "gqa": "mean", "score": "pooled"}
BOTH = {**EVICT, "keep_ratio": 0.6, "method": "both", "protected_prefix_tokens": 32}
# One band, so that its two layers share a table in graphs. Of the longest prompt heads hold one
# block or three.
SHARES = tiny.head_shares(num_layers=2, num_heads=2)
HEADS = {**EVICT, "num_bands": 1, "head_shares": SHARES}
SMALL = {"max_model_len": 256, "max_num_seqs": 4}
FLOAT = {"dtype": "float32"}
# name: (spindle, vLLM, Triton attention, mode of graphs, splits of the codebook kernel)
MODES: dict[str, tuple[dict[str, Any], dict[str, Any], bool, str | None, int]] = {
    "cpu": (EVICT, FLOAT, False, None, 1),
    "evict": (EVICT, FLOAT, True, None, 1),
    "waits": (WAITS, FLOAT, True, None, 1),
    "codebooks": (BOTH, {"dtype": "float16"}, True, None, 1),
    "in graphs": (BOTH, {"dtype": "float16"}, True, "FULL_DECODE_ONLY", 3),
    "heads, cpu": (HEADS, FLOAT, False, None, 1),
    "heads": (HEADS, FLOAT, True, None, 1),
    "heads in graphs": (HEADS, FLOAT, True, "FULL_DECODE_ONLY", 1),
    "heads in full": (HEADS, FLOAT, True, "FULL", 1),
}
SIZES = [1, 2, 4]
# The second prompt ends in a chunk of one token, beside decodes of the first and third.
PROMPT_LENS = [90, 193, 57]


def served(model: str) -> dict[str, Any]:
    """Per mode: tokens, classes, and how attention agrees with the torch twin."""
    from dataclasses import asdict
    from unittest.mock import patch

    from engine_probe.interpreted import enable, triton_attention

    enable()
    from engine_probe.engines import Ask, engine
    from engine_probe.graphs import full_graphs
    from engine_probe.twin import capture, compare
    from vllm_spindle.core import choice
    from vllm_spindle.kernels import device_compaction, device_decode, device_scoring

    def counted(module: Any, name: str) -> Any:
        """Calls go through, and are counted."""
        return stack.enter_context(patch.object(module, name, wraps=getattr(module, name)))

    prompts = [each["prompt_token_ids"] for each in tiny.prompts(3, PROMPT_LENS, seed=2)]
    asks = [Ask(prompt, max_tokens=5) for prompt in prompts]
    found: dict[str, Any] = {}
    for name, (spindle, options, is_triton, graph_mode, num_splits) in MODES.items():
        with ExitStack() as stack:
            if is_triton:
                stack.enter_context(triton_attention())
            stack.enter_context(
                patch.object(device_decode, "_choose_splits", lambda *_, n=num_splits: n)
            )
            graphs: dict[Any, int] = {}
            if graph_mode is not None:
                graphs = stack.enter_context(full_graphs(graph_mode, SIZES))
            running = stack.enter_context(engine(model, spindle, **SMALL, **options))
            running.chunk(96)
            seen = None if graph_mode else stack.enter_context(capture())
            by_torch = counted(choice, "answer")
            by_kernel = counted(device_scoring, "DeviceAttention")
            moved = counted(device_compaction, "compact")
            tokens = running.run(asks)
            calls = [each.call_count for each in (by_torch, by_kernel, moved)]
            reduction = running.core.model_executor.driver_worker.worker._reduction
            found[name] = {
                "tokens": tokens,
                "backend": reduction._backend,
                "decoders": sorted({type(d).__name__ for d in reduction._decoders.values()}),
                "replays": sum(graphs.values()),
                "calls": calls,
                "idle_free": running.is_idle_and_free,
            }
            if seen is not None:
                lens = {f"r{i}": (length, None) for i, length in enumerate(PROMPT_LENS)}
                policy = running.managers[0].kv_cache_spec.policy
                found[name] |= asdict(compare(seen, policy, lens))
    return found


@pytest.fixture(scope="module")
def found(small_llama: str) -> dict[str, Any]:
    return in_child(served, env=ENVIRONMENT, imports_vllm_itself=True, model=small_llama)


def test_the_backend_is_the_one_asked_for(found: dict[str, Any]) -> None:
    """And with it the kernel over codebooks; every block is free in the end."""
    for name, (spindle, _, is_triton, *_) in MODES.items():
        assert found[name]["backend"] == ("TRITON_ATTN" if is_triton else "CPU_ATTN")
        kernels = ["DeviceRegionDecoder"] if spindle is BOTH else []
        assert found[name]["decoders"] == kernels
    assert all(each["idle_free"] for each in found.values())


def test_evicted_rows_are_read_as_by_the_cpu(found: dict[str, Any]) -> None:
    """Token for token; what is left is what the core keeps, and it is attended."""
    assert found["evict"]["tokens"] == found["cpu"]["tokens"]
    assert found["evict"]["kept_differ"] == 0 < found["evict"]["kept_layers"]
    assert found["evict"]["error"] < 1e-4 < 1e-2 < found["evict"]["error_to_full"]


def test_kv_heads_with_blocks_of_their_own_are_read_as_by_the_cpu(found: dict[str, Any]) -> None:
    """Token for token; each head attends to what the core keeps for it."""
    assert found["heads"]["tokens"] == found["heads, cpu"]["tokens"] != found["evict"]["tokens"]
    assert found["heads"]["kept_differ"] == 0 < found["heads"]["kept_layers"]
    assert found["heads"]["error"] < 1e-4 < 1e-2 < found["heads"]["error_to_full"]


def test_kernels_score_and_move_and_torch_does_on_the_cpu(found: dict[str, Any]) -> None:
    """Three prompts in two layers; with codebooks one is long enough, and nothing is moved."""
    assert found["cpu"]["calls"] == [6, 0, 0]
    assert found["evict"]["calls"] == found["waits"]["calls"] == [0, 6, 6]
    assert found["codebooks"]["calls"] == found["in graphs"]["calls"] == [0, 2, 0]
    assert found["heads, cpu"]["calls"] == [6, 0, 0]
    for name in ("heads", "heads in graphs", "heads in full"):
        assert found[name]["calls"] == [0, 6, 6]


def test_tokens_of_the_answer_choose_as_in_the_core(found: dict[str, Any]) -> None:
    """Queries laid aside after the prompt, a mean over the group, the window's score alone."""
    assert found["waits"]["kept_differ"] == 0 < found["waits"]["kept_layers"]
    assert found["waits"]["error"] < 1e-4 < 1e-2 < found["waits"]["error_to_full"]


def test_codebooks_are_read_as_by_the_oracle(found: dict[str, Any]) -> None:
    """In batches with whole rows and prompts under way, behind a protected prefix.

    Up to the rounding of queries and outputs, float16, and of entries, bfloat16.
    """
    assert found["codebooks"]["merged_rows"] >= 8
    assert found["codebooks"]["merged_error"] < 1e-2
    assert found["codebooks"]["prompt_error"] < 4e-3


def test_graphs_change_nothing(found: dict[str, Any]) -> None:
    """Token for token, with the codebook kernel split three ways, and with heads on their own."""
    pairs = {
        "in graphs": "codebooks",
        "heads in graphs": "heads",
        "heads in full": "heads",
    }
    for name, eager in pairs.items():
        assert found[name]["tokens"] == found[eager]["tokens"]
        assert found[name]["replays"] >= 4
