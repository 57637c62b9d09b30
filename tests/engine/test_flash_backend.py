"""vLLM's FlashAttention backend, its kernels stood in for, on runner V2: the CPU's tokens.

Its classes are the real ones, with FlashAttention 3's plan of the lengths ahead; the stand-in
refuses what the kernel would, and a plan of other lengths (``engine_probe/flash.py``). Our kernels
are interpreted. Eagerly, and with CUDA graphs emulated.
"""

from contextlib import ExitStack
from typing import Any

import pytest

import tiny
from engine_child import in_child
from engine_probe.interpreted import ENVIRONMENT

pytestmark = pytest.mark.engine

EVICT = {"keep_ratio": 0.7, "min_prompt_len": 32, "window": 16}
HEADS = {
    **EVICT,
    "num_bands": 1,
    "head_shares": tiny.head_shares(num_layers=2, num_heads=2),
}
PREFIX = {**HEADS, "protected_prefix_tokens": 32}
OPTIONS = {"max_model_len": 256, "max_num_seqs": 4, "dtype": "float32"}
# name: (spindle, mode of graphs or None), each also by the CPU's attention on V1
MODES: dict[str, tuple[dict[str, Any], str | None]] = {
    "evict": (EVICT, None),
    "evict, decodes": (EVICT, "FULL_DECODE_ONLY"),
    "evict, full": (EVICT, "FULL"),
    "heads": (HEADS, None),
    "heads, decodes": (HEADS, "FULL_DECODE_ONLY"),
    "heads, full": (HEADS, "FULL"),
    "prefix, decodes": (PREFIX, "FULL_DECODE_ONLY"),
    "prefix, full": (PREFIX, "FULL"),
}
ALONE = {"evict": EVICT, "heads": HEADS, "prefix": PREFIX}
# Beside vLLM's Triton attention, as the CPU's has no codebooks in float16, nor they float32.
BOTH = {**EVICT, "keep_ratio": 0.6, "method": "both", "protected_prefix_tokens": 32}
CODEBOOKS: dict[str, str | None] = {
    "by Triton": None,
    "by FlashAttention": None,
    "by FlashAttention, decodes": "FULL_DECODE_ONLY",
    "by FlashAttention, full": "FULL",
}
SIZES = [1, 2, 4, 96]
# The second prompt ends in a chunk of one token, beside decodes of the first and third.
PROMPT_LENS = [90, 193, 57]


def served(model: str, version: int) -> dict[str, Any]:
    """Per mode: tokens, the backend, replays."""
    from engine_probe.interpreted import enable

    if version == 2:
        enable()
    from unittest.mock import patch

    from engine_probe import flash
    from engine_probe.engines import Ask, engine
    from engine_probe.graphs import full_graphs

    attend, splits = flash.varlen, set()

    def watched(**given: Any) -> None:
        splits.add(given["num_splits"])
        attend(**given)

    prompts = [each["prompt_token_ids"] for each in tiny.prompts(3, PROMPT_LENS, seed=2)]
    asks = [Ask(prompt, max_tokens=5) for prompt in prompts]
    modes = MODES if version == 2 else {name: (spindle, None) for name, spindle in ALONE.items()}
    found: dict[str, Any] = {}
    for name, (spindle, graph_mode) in modes.items():
        with ExitStack() as stack:
            splits.clear()
            if version == 2:
                stack.enter_context(patch.object(flash, "varlen", watched))
                stack.enter_context(flash.flash_attention())
            graphs = stack.enter_context(full_graphs(graph_mode, SIZES)) if graph_mode else {}
            running = stack.enter_context(engine(model, spindle, **OPTIONS))
            running.chunk(96)
            found[name] = {
                "tokens": running.run(asks),
                "backend": running.core.model_executor.driver_worker.worker._reduction._backend,
                "replays": {str(kind): count for kind, count in graphs.items()},
                "idle_free": running.is_idle_and_free,
                "splits": sorted(splits),
            }
    return found


def merged(model: str) -> dict[str, Any]:
    """Per run over codebooks: tokens, and replays."""
    from dataclasses import replace
    from unittest.mock import patch

    from engine_probe.interpreted import enable, triton_attention

    enable()
    from engine_probe.engines import Ask, engine
    from engine_probe.flash import flash_attention
    from engine_probe.graphs import full_graphs
    from vllm_spindle.engine import platforms

    prompts = [each["prompt_token_ids"] for each in tiny.prompts(3, PROMPT_LENS, seed=2)]
    asks = [Ask(prompt, max_tokens=5) for prompt in prompts]
    found: dict[str, Any] = {}
    for name, graph_mode in CODEBOOKS.items():
        with ExitStack() as stack:
            stack.enter_context(triton_attention() if "Triton" in name else flash_attention())
            halves = replace(platforms.CPU, codebook_dtypes=platforms.CUDA.codebook_dtypes)
            stack.enter_context(patch.object(platforms, "CPU", halves))
            graphs = stack.enter_context(full_graphs(graph_mode, SIZES)) if graph_mode else {}
            options = {**OPTIONS, "dtype": "float16"}
            running = stack.enter_context(engine(model, BOTH, **options))
            running.chunk(96)
            found[name] = {"tokens": running.run(asks), "replays": sum(graphs.values())}
    return found


def test_codebooks_beside_flash_attention(small_llama: str) -> None:
    """Tails by it, regions by our kernel: as beside Triton's attention, whatever is captured."""
    found = in_child(merged, env=ENVIRONMENT, imports_vllm_itself=True, model=small_llama)
    said = found.pop("by Triton")["tokens"]
    assert [run["tokens"] for run in found.values()] == [said] * 3
    assert [run["replays"] >= 4 for run in found.values()] == [False, True, True]


@pytest.fixture(scope="module")
def found(small_llama: str) -> dict[str, Any]:
    v2 = in_child(served, env=ENVIRONMENT, imports_vllm_itself=True, model=small_llama, version=2)
    return {"v1": in_child(served, model=small_llama, version=1), "v2": v2}


@pytest.mark.parametrize("mode", MODES)
def test_same_tokens_as_by_the_cpu(found: dict[str, Any], mode: str) -> None:
    """Token for token, whatever is captured; every block is free in the end."""
    run, alone = found["v2"][mode], found["v1"][mode.partition(",")[0]]
    assert (run["backend"], alone["backend"]) == ("FLASH_ATTN", "CPU_ATTN")
    assert run["tokens"] == alone["tokens"]
    assert run["idle_free"]


@pytest.mark.parametrize("mode", [name for name in MODES if "," in name])
def test_it_ran_as_graphs(found: dict[str, Any], mode: str) -> None:
    """Decodes, and where graphs hold prompts whole chunks."""
    replays = found["v2"][mode]["replays"]
    assert sum(replays.values()) >= 4
    assert ("96" in replays) == mode.endswith("full")


@pytest.mark.parametrize("mode", MODES)
def test_graphs_are_held_to_the_splits_that_they_have_room_for(
    found: dict[str, Any], mode: str
) -> None:
    """32 by default, also for heads on their own, which are K times as many tokens; else any."""
    assert found["v2"][mode]["splits"] == ([32] if "," in mode else [0])


def test_they_can_tell(found: dict[str, Any]) -> None:
    """Each of the configurations answers in its own way."""
    evict, heads, prefix = (found["v1"][name]["tokens"] for name in ALONE)
    assert evict != heads != prefix != evict


# Kernels that cannot read pages of one kv head: what start-up must say.
BROKEN = {
    "heads in one": "off by",
    "not a number": "off by nan",
    "many rows": "off by",
    "refuses": "its kernel says: strides",
}


def started(model: str) -> dict[str, str]:
    """What an engine with each of the broken kernels says at its start; the last one is whole."""
    from unittest.mock import patch

    from engine_probe.interpreted import enable

    enable()
    from engine_probe import flash
    from engine_probe.engines import engine
    from vllm_spindle.engine import sham_rows

    whole = flash.varlen

    def heads_in_one(**given: Any) -> None:
        """Every kv head reads the first one's pages."""
        whole(**{**given, "block_table": given["block_table"] // 2 * 2})

    def not_a_number(**given: Any) -> None:
        given["out"].fill_(float("nan"))

    def many_rows(**given: Any) -> None:
        """Right up to 992 rows."""
        whole(**given)
        if len(given["seqused_k"]) > flash.SPLIT_ROWS:
            given["out"].zero_()

    def refuses(**given: Any) -> None:
        raise RuntimeError("strides")

    kernels = (heads_in_one, not_a_number, many_rows, refuses, whole)
    found = {}
    for name, kernel in zip((*BROKEN, "none"), kernels, strict=True):
        options = {**OPTIONS, "max_num_seqs": 512}
        with (
            patch.object(flash, "varlen", kernel),
            flash.flash_attention(),
            # As many rows and tokens as on a GPU.
            patch.object(sham_rows, "FEW_ROWS", sham_rows.MANY_ROWS // 2 + 1),
            patch.object(sham_rows, "FEW_TOKENS", sham_rows.MANY_TOKENS),
        ):
            try:
                with engine(model, HEADS, **options):
                    found[name] = ""
            except ValueError as error:
                found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def starts(small_llama: str) -> dict[str, Any]:
    return in_child(started, env=ENVIRONMENT, imports_vllm_itself=True, model=small_llama)


@pytest.mark.parametrize("kernel", BROKEN)
def test_a_kernel_that_cannot_is_refused_at_start_up(starts: dict[str, str], kernel: str) -> None:
    """By name, with the way out; one that can starts."""
    assert starts["none"] == ""
    place = 0
    for part in (
        "spindle does not support budget=measured",
        "not read right by FLASH_ATTN",
        BROKEN[kernel],
        "use budget uniform, or --attention-backend TRITON_ATTN",
    ):
        assert part in starts[kernel][place:], starts[kernel]
        place = starts[kernel].index(part, place)
