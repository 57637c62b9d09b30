"""Model runner V2, its kernels interpreted on the CPU: pruned as V1 prunes, token for token.

Eagerly, and in emulated CUDA graphs and a step ahead, with the text of others beside the pictures.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from engine_child import in_child
from engine_probe.interpreted import ENVIRONMENT

pytestmark = pytest.mark.engine

ON = {"selector": "divprune", "keep_ratio": 0.5}
# In the same engine; prompts must be long enough.
BOTH = {
    "covipal": ON,
    "spindle": {"keep_ratio": 0.5, "window": 16, "min_prompt_len": 64, "deep_visual_share": 0.25},
}
# A chunk is a graph, too.
SIZES = [1, 3, 8]
# One position per token, and three.
FAMILIES = ("llava_next", "qwen2_5_vl")


def served(model: str, family: str, version: int) -> dict[str, Any]:
    """Pruned, unpruned by request and stock: tokens, positions that reach the model, counts."""
    if version == 2:
        from engine_probe.interpreted import enable

        enable()
    from engine_probe.lvlm import LvlmAsk, Watch, answer, lvlm_engine, model_of

    asks = [
        LvlmAsk("@ what is red ?", [(96, 48, 1)]),
        LvlmAsk("left @ or right @ ?", [(48, 96, 2), (64, 64, 3)], keep_ratio=0.25),
        LvlmAsk("You are @ blue circle", [(64, 48, 4)], keep_ratio=1.0),
        LvlmAsk("what is the color of red circle ?"),
    ]
    found: dict[str, Any] = {}
    # A pruned picture of qwen2_5_vl has 4 to 12 tokens: chunks of 8 cut it.
    options = {
        "dtype": "float32",
        "max_num_batched_tokens": 8,
        "max_num_seqs": 4,
        "enable_prefix_caching": False,
    }
    for name, covipal in (("pruned", ON), ("stock", None)):
        with lvlm_engine(model, family, covipal, **options) as llm:
            runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
            found["is_v2"] = hasattr(runner.worker.model_runner, "req_states")
            watch = Watch(model_of(llm))
            cut = _watch_cuts(llm)
            plain = [ask if covipal else LvlmAsk(ask.words, ask.pictures) for ask in asks]
            answers = answer(llm, family, plain, max_tokens=6, one_by_one=True)
            found[name] = {
                "tokens": [a["tokens"] for a in answers],
                "lengths": [a["prompt_len"] for a in answers],
                "positions": [each.tolist() for each in watch.positions],
                "chosen": [index.tolist() for index in watch.indices],
                "num_cut": len(cut),
            }
    found["both"] = _both(model, family)
    if version == 2:
        for name, covipal in (("pruned, graphs", ON), ("stock, graphs", None)):
            plain = [ask if covipal else LvlmAsk(ask.words, ask.pictures) for ask in asks]
            with _graphs(), lvlm_engine(model, family, covipal, **options) as llm:
                answers = answer(llm, family, plain, max_tokens=6)
                found[name] = [a["tokens"] for a in answers]
        with _graphs() as replays:
            found["both, graphs"] = _both(model, family) | {"replays": sum(replays.values())}
    return found


def _both(model: str, family: str) -> dict[str, Any]:
    """Both plugins: tokens, blocks left, and whom the adapters still know."""
    from engine_probe.lvlm import LvlmAsk, answer, lvlm_engine

    words = "what is the color of red circle ? " * 11
    asks = [LvlmAsk(f"@ {words} @ left ?", [(96, 48, i), (64, 64, i + 9)]) for i in range(2)]
    asks.append(LvlmAsk(words))
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 4, "enable_prefix_caching": False}
    with lvlm_engine(model, family, None, additional_config=BOTH, **options) as llm:
        core = llm.llm_engine.engine_core.engine_core
        answers = answer(llm, family, asks, max_tokens=6)
        llm.llm_engine.step()  # Let the worker hear of the last ones.
        pool = core.scheduler.kv_cache_manager.block_pool
        reducer = core.model_executor.driver_worker.worker._reduction.reducer
        return {
            "tokens": [a["tokens"] for a in answers],
            "reductions": core.scheduler._stats["reductions"],
            "left": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            "known": reducer.holders(),
        }


@contextmanager
def _graphs() -> Iterator[Any]:
    """Engines made inside: whole forwards as graphs, a step ahead."""
    from engine_probe.graphs import full_graphs
    from engine_probe.interpreted import async_scheduling

    with async_scheduling(), full_graphs("FULL", SIZES) as replays:
        yield replays


def _watch_cuts(llm: Any) -> set[Any]:
    """Requests' pictures that a chunk ends inside of, filled as they are scheduled."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    stock, cut = scheduler.schedule, set()

    def schedule(*args: Any, **kwargs: Any) -> Any:
        for request in scheduler.running:
            for i, feature in enumerate(request.mm_features):
                place = request.num_computed_tokens - feature.mm_position.offset
                if 0 < place < feature.mm_position.length:
                    cut.add((request.request_id, i))
        return stock(*args, **kwargs)

    scheduler.schedule = schedule
    return cut


@pytest.fixture(scope="module", params=FAMILIES)
def versions(request: pytest.FixtureRequest, lvlm: Callable[[str], str]) -> dict[str, Any]:
    """One family on both runners, each in a process of its own."""
    model, family = lvlm(request.param), request.param
    return {
        "v1": in_child(served, model=model, family=family, version=1),
        "v2": in_child(
            served, env=ENVIRONMENT, imports_vllm_itself=True, model=model, family=family, version=2
        ),
    }


@pytest.mark.parametrize("what", ["tokens", "lengths", "positions", "chosen"])
@pytest.mark.parametrize("side", ["pruned", "stock"])
def test_as_on_v1(versions: dict[str, Any], side: str, what: str) -> None:
    """The same rows chosen, at the same positions, the same answers."""
    assert versions["v2"]["is_v2"] and not versions["v1"]["is_v2"]
    assert versions["v2"][side][what] == versions["v1"][side][what]


def test_chunks_cut_pictures(versions: dict[str, Any]) -> None:
    """All four pictures, pruned or not: their positions come in parts."""
    for found in versions.values():
        assert [found[side]["num_cut"] for side in ("pruned", "stock")] == [4, 4]


def test_it_pruned(versions: dict[str, Any]) -> None:
    """Prompts are shorter where asked, and only there."""
    pruned, stock = (versions["v2"][side]["lengths"] for side in ("pruned", "stock"))
    assert [a < b for a, b in zip(pruned, stock, strict=True)] == [True, True, False, False]
    assert len(versions["v2"]["pruned"]["chosen"]) == 3


@pytest.mark.parametrize("side", ["pruned", "stock"])
def test_graphs_change_nothing(versions: dict[str, Any], side: str) -> None:
    """Token for token, in one batch and a step ahead."""
    assert versions["v2"][f"{side}, graphs"] == versions["v1"][side]["tokens"]


def test_off_is_stock(versions: dict[str, Any]) -> None:
    """Ratio 1.0, and text alone, beside pruned pictures; eagerly and in graphs."""
    v2 = versions["v2"]
    stock = v2["stock"]["tokens"]
    for pruned in (v2["pruned"]["tokens"], v2["pruned, graphs"]):
        assert pruned[2:] == stock[2:]
        assert pruned[:2] != stock[:2]


def test_both_plugins(versions: dict[str, Any]) -> None:
    """Pruned, then reduced, as on V1; in graphs, too, and nothing is left."""
    expected = versions["v1"]["both"]["tokens"]
    graphs = versions["v2"]["both, graphs"]
    for found in (versions["v1"]["both"], versions["v2"]["both"], graphs):
        assert found["tokens"] == expected
        assert found["reductions"] == 3
        assert found["left"] == 0
        assert found["known"] == []
    assert graphs["replays"] >= 5
