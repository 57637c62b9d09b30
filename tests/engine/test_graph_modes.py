"""Every mode of CUDA graphs that vLLM has, emulated on a CPU, on model runner V2.

Requests come and go, so that most batches lie between two captured sizes: some rows are reduced,
some are not, some are padding, and a place of a replay was another row's before.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import combinations
from typing import Any
from unittest.mock import patch

import pytest

import tiny
from engine_child import in_child
from engine_probe.interpreted import ENVIRONMENT

pytestmark = pytest.mark.engine

# Short ones stay whole.
PROMPT_LENS = [110, 40, 129, 20, 193, 90, 33, 161, 20, 65, 110, 34]
CHUNK = 96
SIZES = [1, 2, 7, 16, CHUNK]
SMALL = {"max_num_seqs": 16, "max_model_len": 224, "dtype": "float32"}
BF16 = {"dtype": "bfloat16"}  # for codebooks
LITTLE = {"kv_cache_memory_bytes": 256 << 10}
PLENTY = {"kv_cache_memory_bytes": 16 << 20}
LONG = 12  # more tokens for each answer, where memory is counted
EVICT = {"keep_ratio": 0.7, "min_prompt_len": 48, "window": 16}
# Bands of different methods, the deeper one with fewer tokens.
PYRAMID = {**EVICT, "budget": "pyramid", "beta": 0.2}
# One band, so that its two layers share what is filled layer by layer; and two, of one each.
HEADS = {**EVICT, "num_bands": 1, "head_shares": tiny.head_shares(num_layers=2, num_heads=2)}
HEADS_IN_BANDS = {**HEADS, "num_bands": 2}
SPINDLE: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "off": (None, {}),
    "evict": (EVICT, {}),
    "bands": ({**PYRAMID, "band_methods": ["evict", "both"]}, BF16),
    "preempted": ({**PYRAMID, "band_methods": ["merge", "both"]}, {**BF16, **LITTLE}),
    "unpreempted": ({**PYRAMID, "band_methods": ["merge", "both"]}, {**BF16, **PLENTY}),
    "heads": (HEADS, {}),
    "heads preempted": (HEADS_IN_BANDS, LITTLE),
    "heads unpreempted": (HEADS_IN_BANDS, PLENTY),
    # A prefix of one block before what heads share out.
    "heads, prefix": ({**HEADS, "protected_prefix_tokens": 32}, {}),
    # No row is padding, but tokens are.
    "heads in few rows": (HEADS, {"max_num_seqs": 4}),
}
# name: (vLLM's mode, whether torch.compile splits the model)
GRAPHS: dict[str, tuple[str, bool]] = {
    "compiled": ("NONE", True),
    "decodes": ("FULL_DECODE_ONLY", False),
    "full": ("FULL", False),
    "pieces, compiled": ("PIECEWISE", True),
    "pieces, broken": ("PIECEWISE", False),
    "both, compiled": ("FULL_AND_PIECEWISE", True),
    "both, broken": ("FULL_AND_PIECEWISE", False),
}
RUNS = [
    *(("evict", graphs) for graphs in GRAPHS),
    # Not compiled: bfloat16 shows that the operations are others, and rounded elsewhere.
    *(("bands", graphs) for graphs in ("decodes", "pieces, broken")),
    ("preempted", "both, broken"),
    *(("heads", graphs) for graphs in ("decodes", "full", "pieces, broken", "both, compiled")),
    *(("heads preempted", graphs) for graphs in ("full", "both, broken")),
    *(("heads, prefix", graphs) for graphs in ("decodes", "full", "both, broken")),
    ("heads in few rows", "full"),
    ("off", "both, compiled"),
]


def served(model: str, version: int) -> dict[str, Any]:
    """Per run: tokens, replays by their size, and what the plan's watch saw."""
    if version == 1:
        return {name: _run(model, *options, None) for name, options in SPINDLE.items()}
    from engine_probe.interpreted import enable

    enable()
    found: dict[str, Any] = {}
    for name, graphs in RUNS:
        found[f"{name} | {graphs}"] = _run(model, *SPINDLE[name], GRAPHS[graphs])
    for mistake, (name, graphs) in MISTAKES.items():
        with _mistake(mistake):
            found[mistake] = _run(model, *SPINDLE[name], GRAPHS[graphs])
    return found


def _run(
    model: str,
    spindle: dict[str, Any] | None,
    options: dict[str, Any],
    graphs: tuple[str, bool] | None,
) -> dict[str, Any]:
    from engine_probe.engines import engine
    from engine_probe.graphs import full_graphs
    from engine_probe.plan_watch import PlanWatch

    with ExitStack() as stack:
        replays = {}
        if graphs is not None:
            mode, is_compiled = graphs
            replays = stack.enter_context(full_graphs(mode, SIZES, is_compiled=is_compiled))
            options = {**options, "enforce_eager": not is_compiled}
        running = stack.enter_context(engine(model, spindle, **{**SMALL, **options}))
        watch = stack.enter_context(PlanWatch(running)) if spindle else None
        running.chunk(CHUNK)
        tokens = _come_and_go(running, LONG if "kv_cache_memory_bytes" in options else 0)
        return {
            "tokens": tokens,
            "replays": {str(kind): count for kind, count in replays.items()},
            **(watch.report() if watch else {}),
        }


def _come_and_go(running: Any, more: int = 0) -> list[list[int]]:
    """Four at once, then one every step; answers of different lengths."""
    from engine_probe.engines import Ask

    prompts = tiny.prompts(len(PROMPT_LENS), PROMPT_LENS, seed=4)
    asks = [Ask(each["prompt_token_ids"], more + 7 + 3 * (i % 4)) for i, each in enumerate(prompts)]
    joining = list(enumerate(asks))
    finished: dict[str, Any] = {}
    while joining or running.engine.has_unfinished_requests():
        for _ in range(4 if len(joining) == len(asks) else 1):
            if joining:
                index, ask = joining.pop(0)
                running.add(str(index), ask)
        finished |= {out.request_id: out for out in running.step() if out.finished}
    running.step()  # Let the worker hear of the last ones.
    return [list(finished[str(i)].outputs[0].token_ids) for i in range(len(asks))]


# What a graph would punish: (SPINDLE, GRAPHS) that must say something else by it.
MISTAKES = {
    "queries not copied": ("evict", "pieces, broken"),
    "whole rows not written": ("evict", "decodes"),
    "rows not unmarked": ("bands", "decodes"),
    "a layer not filled": ("heads", "decodes"),
    "pages of the capture": ("heads", "decodes"),
    "padding in a row": ("heads in few rows", "full"),
}


@contextmanager
def _mistake(name: str) -> Iterator[None]:
    from vllm_spindle.engine import backend
    from vllm_spindle.engine.region_rows import RegionRows
    from vllm_spindle.engine.shared_head_table import HeadBatch, SharedHeadTable
    from vllm_spindle.engine.shifted_table import ShiftedTable
    from vllm_spindle.engine.window import WindowStash

    shift, write = ShiftedTable.shift, RegionRows._write
    fill, take = HeadBatch.fill, SharedHeadTable._rows

    class Later:
        """Rows of a tensor that are looked up when they are wanted."""

        def __init__(self, queries: Any, source: Any) -> None:
            self._queries, self._source = queries, source

        def __getitem__(self, rows: slice) -> Any:
            return self._queries[self._source[rows]]

    def keep(stash: Any, layer_idx: int, queries: Any) -> None:
        if stash._rows is not None:
            stash._taken[layer_idx] = Later(queries, stash._source)

    def shift_some(table: Any, common: Any, rows: Any) -> Any:
        if rows is None and table._table is not None:
            kept = table._buffers(common.block_table_tensor, common.seq_lens)
            return common.replace(block_table_tensor=kept[0], seq_lens=kept[1])
        return shift(table, common, rows)

    def write_some(regions: Any, codebooks: Any) -> None:
        if codebooks is not None or regions._written is None:
            write(regions, codebooks)

    def fill_first(batch: Any, layer: int) -> None:
        if layer == 0:
            fill(batch, layer)

    def copy_rows(table: Any, num_rows: int) -> Any:
        rows = take(table, num_rows)
        return replace(rows, head_blocks=rows.head_blocks.clone())

    mistakes = {
        "queries not copied": patch.object(WindowStash, "record", keep),
        "whole rows not written": patch.object(ShiftedTable, "shift", shift_some),
        "rows not unmarked": patch.object(RegionRows, "_write", write_some),
        "a layer not filled": patch.object(HeadBatch, "fill", fill_first),
        "pages of the capture": patch.object(SharedHeadTable, "_rows", copy_rows),
        "padding in a row": patch.object(backend, "may_hold_prompts", lambda config: False),
    }
    with mistakes[name]:
        yield


@pytest.fixture(scope="module")
def found(small_llama: str) -> dict[str, Any]:
    """Both runners, each in a process of its own."""
    from engine_probe.recorded import BREAKABLE

    env = {**ENVIRONMENT, BREAKABLE: "1", "VLLM_DISABLE_COMPILE_CACHE": "1"}
    v2 = in_child(served, env=env, imports_vllm_itself=True, model=small_llama, version=2)
    return {"v1": in_child(served, model=small_llama, version=1), "v2": v2}


@pytest.mark.parametrize(("name", "graphs"), RUNS)
def test_same_tokens(found: dict[str, Any], name: str, graphs: str) -> None:
    """Token for token as V1 says, whatever is captured."""
    assert found["v2"][f"{name} | {graphs}"]["tokens"] == found["v1"][name]["tokens"]


@pytest.mark.parametrize(("name", "graphs"), [run for run in RUNS if run[0] != "off"])
def test_plan_is_held(found: dict[str, Any], name: str, graphs: str) -> None:
    """At every step; nothing is left, of nobody."""
    run = found["v2"][f"{name} | {graphs}"]
    assert run["problems"] == run["left_over"] == []
    assert run["idle_free"]
    # Of every band, and there are two or one.
    assert run["reduced_rows"] >= 60 and run["whole_rows"] >= 60
    assert (run["preemptions"] > 0) == name.endswith("preempted")


@pytest.mark.parametrize(("name", "graphs"), RUNS)
def test_it_ran_as_graphs(found: dict[str, Any], name: str, graphs: str) -> None:
    """In the mode that was asked for, at sizes that no batch has but by padding."""
    replays = found["v2"][f"{name} | {graphs}"]["replays"]
    mode, _ = GRAPHS[graphs]
    full = {kind for kind in replays if kind.isdigit()}
    assert bool(full) == mode.startswith("FULL")
    assert bool(replays.keys() - full) == mode.endswith("PIECEWISE")
    assert mode == "NONE" or sum(replays.values()) > 12
    # No step has just as many tokens: seven at most where memory or rows are few.
    padded = {"7", "16"} if name in ("off", "evict", "bands", "heads") else {"7"}
    assert mode == "NONE" or padded <= {kind.removesuffix(" in pieces") for kind in replays}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_bench_sees_what_is_stale(found: dict[str, Any], mistake: str) -> None:
    """Mistakes that a graph would punish give other tokens."""
    name, _ = MISTAKES[mistake]
    assert found["v2"][mistake]["tokens"] != found["v1"][name]["tokens"]


def test_they_can_tell(found: dict[str, Any]) -> None:
    """Each of the configurations answers in its own way."""
    said = {name: run["tokens"] for name, run in found["v1"].items()}
    for name in ("", "heads "):
        assert said.pop(f"{name}preempted") == said[f"{name}unpreempted"]
    assert said.pop("heads in few rows") == said["heads"]
    assert all(said[one] != said[other] for one, other in combinations(said, 2))
