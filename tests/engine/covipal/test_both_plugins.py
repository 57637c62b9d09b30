"""Both plugins in one engine: visual tokens pruned, then the cache of what is left reduced."""

from collections.abc import Callable
from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine

FAMILY = "llava_next"
COVIPAL = {"selector": "divprune", "keep_ratio": 0.5}
SPINDLE = {"keep_ratio": 0.5, "window": 16, "min_prompt_len": 64, "deep_visual_share": 0.25}


def answers(model: str) -> dict[str, Any]:
    """Covipal alone; with spindle on and every request keeping all; with spindle reducing."""
    from engine_probe.lvlm import LvlmAsk, answer, lvlm_engine
    from vllm_spindle.engine.evicted_regions import DenseRegion

    words = "what is the color of red circle ? " * 12
    asks = [LvlmAsk(f"@ {words} @ left right ?", [(96, 48, i), (64, 64, i + 10)]) for i in range(6)]
    asks.append(LvlmAsk(words * 2))
    found: dict[str, Any] = {}
    with lvlm_engine(model, FAMILY, COVIPAL, enable_prefix_caching=False) as llm:
        found["covipal alone"] = answer(llm, FAMILY, asks)
    chosen = []
    stock_keep = DenseRegion.keep

    def keep(self: Any, work: Any, kept: Any) -> None:
        counts = {"num_context": work.context.stop, "num_kept": self.counts(work)[0]}
        mask = None if work.visual is None else work.visual.mask
        rows = kept.view(-1, counts["num_kept"])
        chosen.append(
            {
                **counts,
                "share": None if work.visual is None else work.visual.share,
                "visual": None if mask is None else int(mask[: counts["num_context"]].sum()),
                "kept_visual": None if mask is None else mask[rows].sum(-1).tolist(),
            }
        )
        stock_keep(self, work, kept)

    for name, keep_ratio in (("both", SPINDLE["keep_ratio"]), ("keep all", 1.0)):
        additional = {"covipal": COVIPAL, "spindle": {**SPINDLE, "keep_ratio": keep_ratio}}
        options = {"additional_config": additional, "enable_prefix_caching": False}
        with lvlm_engine(model, FAMILY, None, **options) as llm:
            DenseRegion.keep = keep  # not before: start-up warms up with a sham prompt
            found[name] = answer(llm, FAMILY, asks)
            DenseRegion.keep = stock_keep
            pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
            found[f"{name}, left"] = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    return {**found, "chosen": chosen, **_cached(model, asks)}


def _cached(model: str, asks: list[Any]) -> dict[str, Any]:
    """With a prefix cache: each request alone, another question on its pictures, and it again."""
    from dataclasses import replace

    from vllm import SamplingParams

    from engine_probe.lvlm import answer, lvlm_engine

    others = [replace(ask, words=ask.words.replace("left right", "right left")) for ask in asks]
    # What follows the pictures must be long enough for blocks before the reduced region.
    spindle = {**SPINDLE, "budget": "uniform", "protected_prefix_tokens": 64}
    found: dict[str, Any] = {}
    for name, is_on in (("cache off", False), ("cache on", True)):
        additional = {"covipal": COVIPAL, "spindle": spindle}
        options = {"additional_config": additional, "enable_prefix_caching": is_on}
        with lvlm_engine(model, FAMILY, None, **options) as llm:
            rounds = [answer(llm, FAMILY, each, one_by_one=True) for each in (asks, others, asks)]
            prompt = asks[0].prompt(FAMILY)
            (output,) = llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False)
            found[name] = [[a["tokens"] for a in each] for each in rounds]
            found[f"{name}, hit"] = output.num_cached_tokens
    return found


@pytest.fixture(scope="module")
def found(lvlm: Callable[[str], str]) -> dict[str, Any]:
    """What the three engines said."""
    return in_child(answers, model=lvlm(FAMILY))


def test_spindle_at_one_leaves_covipal_as_it_is(found: dict[str, Any]) -> None:
    """Off is stock there too: the same tokens and log-probabilities."""
    assert found["keep all"] == found["covipal alone"]


def test_both_prune_and_reduce(found: dict[str, Any]) -> None:
    """Prompts are as short as covipal makes them, each is reduced, and no block is left."""
    lengths = [[a["prompt_len"] for a in found[name]] for name in ("both", "covipal alone")]
    assert lengths[0] == lengths[1]
    assert len(found["chosen"]) == 7 * 2  # prompts, layers
    assert [a["tokens"] for a in found["both"]] != [a["tokens"] for a in found["covipal alone"]]
    assert found["both, left"] == found["keep all, left"] == 0


def test_the_prefix_cache_changes_nothing(found: dict[str, Any]) -> None:
    """The same request again, another question on the same pictures: as without a cache."""
    assert found["cache on"] == found["cache off"]
    assert found["cache on, hit"] >= 64 > found["cache off, hit"] == 0


def test_the_deep_band_keeps_a_smaller_share_of_visual_tokens(found: dict[str, Any]) -> None:
    """A quarter of the proportional part in the last layer; no cap in the first, none for text."""
    capped = [each for each in found["chosen"] if each["share"] is not None]
    assert len(capped) == 6
    for each in capped:
        assert each["share"] == SPINDLE["deep_visual_share"]
        assert each["visual"] > 40
        most = int(0.25 * each["num_kept"] * each["visual"] / each["num_context"])
        assert all(count <= most for count in each["kept_visual"])
