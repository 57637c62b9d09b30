"""However requests meet in a batch, in chunks or in a cache, each gets the same answer."""

from collections.abc import Callable
from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine

NUM_REQUESTS = 64
NUM_WITH_ABORTS = 200
OPTIONS = {"selector": "cdpruner", "keep_ratio": 0.5}
CACHELESS = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}


def mixed(num_requests: int, family: str) -> list[Any]:
    """Ratios, picture counts, clips, duplicates, one picture with other words, words alone."""
    import random

    from engine_probe.lvlm import VIDEO_FAMILIES, LvlmAsk

    chooser = random.Random(0)
    words = ("what is red ?", "what is the color of blue square ?", "left or right ?", "Hello")
    shapes = ((96, 48), (48, 96), (64, 64))
    pictures = [(*shapes[i % 3], i) for i in range(7)]
    found = []
    for i in range(num_requests):
        count = (0, 1, 1, 1, 2, 3)[i % 6]
        chosen = chooser.choices(pictures, k=count)
        text = " You ".join(["@"] * count) + " " + chooser.choice(words)
        clips = []
        if family in VIDEO_FAMILIES and i % 8 == 0:
            clips, text = [(4, 64, 64, i // 8 % 3)], f"& {text}"
        ratio = chooser.choice((None, 1.0, 0.5, 0.25, 0.1)) if chosen or clips else None
        found.append(LvlmAsk(text, chosen, clips, keep_ratio=ratio))
    return found


def answers(model: str, family: str) -> dict[str, Any]:
    """The same 64 requests in five ways, on three engines."""
    from engine_probe.lvlm import answer, lvlm_engine, model_of

    asks, found = mixed(NUM_REQUESTS, family), {}
    with lvlm_engine(model, family, {**OPTIONS, "reuse_mib": 0}, **CACHELESS) as llm:
        found["one by one"] = answer(llm, family, asks, one_by_one=True)
    with lvlm_engine(model, family, OPTIONS) as llm:
        pruner = model_of(llm).visual_pruner
        take_stats, pruner.take_stats = pruner.take_stats, lambda: None  # ours, not each step's
        found["batched, cold"] = answer(llm, family, asks)
        found["batched, warm"] = answer(llm, family, asks)
        stats = take_stats()
        llm.reset_prefix_cache()
        found["one by one, kept embeddings"] = answer(llm, family, asks, one_by_one=True)
        late = _ratios_that_come_late(llm, family)
        found["after"] = _idle(llm)
    # Stock vLLM takes no picture that is larger than a chunk and its largest dummy.
    chunk = 96 if family == "llava_onevision" else 64
    chunks = {"max_num_batched_tokens": chunk, "max_num_seqs": 16}
    with lvlm_engine(model, family, OPTIONS, **chunks) as llm:
        found["in small chunks"] = answer(llm, family, asks)
        found["after, chunks"] = _idle(llm)
    tokens = {name: [a["tokens"] for a in of] for name, of in found.items() if "after" not in name}
    return {
        "tokens": tokens,
        "prompt_lens": [a["prompt_len"] for a in found["one by one"]],
        "after": [found["after"], found["after, chunks"]],
        "stats": stats,
        "late": late,
    }


def _ratios_that_come_late(llm: Any, family: str) -> dict[str, str]:
    """What a request is told whose ``SamplingParams`` ask for a ratio; empty if it is served."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    from engine_probe.lvlm import LvlmAsk

    picture = LvlmAsk("@ left or right ?", [(64, 64, 0)])
    asks = {"same": (picture, 0.5), "other": (picture, 0.25), "whole": (picture, 1.0),
            "words alone": (LvlmAsk("left or right ?"), 0.25)}  # fmt: skip
    said = {}
    for name, (ask, ratio) in asks.items():
        params = SamplingParams(max_tokens=1, extra_args={"covipal_keep_ratio": ratio})
        try:
            llm.generate([ask.prompt(family)], params, use_tqdm=False)
            said[name] = ""
        except VLLMValidationError as error:
            said[name] = str(error)
    return said


def aborted(model: str, family: str) -> dict[str, Any]:
    """200 requests, one every other step; a third is aborted a few steps after it came."""
    import random

    from vllm import SamplingParams

    from engine_probe.lvlm import lvlm_engine

    chooser = random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    coming = [(str(i), ask.prompt(family)) for i, ask in enumerate(mixed(NUM_WITH_ABORTS, family))]
    aborts: dict[int, list[str]] = {}  # by step
    for i in chooser.sample(range(NUM_WITH_ABORTS), NUM_WITH_ABORTS // 3):
        aborts.setdefault(2 * i + chooser.randint(1, 16), []).append(str(i))
    found: dict[str, Any] = {"finished": 0, "aborted": {}, "most": {}}
    # Small chunks, so that some are aborted waiting, some half computed, some while they answer.
    limits = {"max_num_batched_tokens": 24, "max_num_seqs": 8}
    with lvlm_engine(model, family, OPTIONS, **limits) as llm:
        engine = llm.llm_engine
        step = 0
        while coming or engine.has_unfinished_requests():
            if coming and step % 2 == 0:
                engine.add_request(*coming.pop(0), params)
            for name in aborts.pop(step, ()):
                stage = _stage(llm, name)
                found["aborted"][stage] = found["aborted"].get(stage, 0) + 1
                engine.abort_request([name])
            found["finished"] += sum(output.finished for output in engine.step())
            for key, count in _idle(llm).items():
                found["most"][key] = max(count, found["most"].get(key, 0))
            step += 1
        found["after"] = _idle(llm)
    return found


def _stage(llm: Any, name: str) -> str:
    """How far a request has come."""
    requests = llm.llm_engine.engine_core.engine_core.scheduler.requests.values()
    # vLLM adds a suffix to the name.
    found = [each for each in requests if each.request_id.rpartition("-")[0] == name]
    if not found:
        return "ended"
    if found[0].num_computed_tokens == 0:
        return "waiting"
    return "answering" if found[0].num_output_tokens else "half computed"


def _idle(llm: Any) -> dict[str, int]:
    """Blocks in use and encoder outputs still referenced, once every request has ended."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    cached = scheduler.encoder_cache_manager.cached
    return {
        "used_blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        "referenced": sum(bool(users) for users in cached.values()),
    }


@pytest.fixture(scope="module", params=("llava", "llava_next", "llava_onevision", "qwen2_5_vl"))
def found(request: pytest.FixtureRequest, lvlm: Callable[[str], str]) -> dict[str, Any]:
    """What every way said, for one family."""
    return in_child(answers, model=lvlm(request.param), family=request.param)


def test_same_tokens_every_way(found: dict[str, Any]) -> None:
    """Batched, in chunks of 64, cold and warm caches, and one at a time without any."""
    expected = found["tokens"].pop("one by one")
    assert len(set(map(tuple, expected))) > NUM_REQUESTS // 3  # the answers can tell
    for name, tokens in found["tokens"].items():
        different = [i for i in range(NUM_REQUESTS) if tokens[i] != expected[i]]
        assert not different, f"{name}: requests {different}"


def test_nothing_is_left_behind(found: dict[str, Any]) -> None:
    """Every KV block is free, no encoder output is referenced."""
    assert found["after"] == [{"used_blocks": 0, "referenced": 0}] * 2


def test_pictures_are_encoded_once(found: dict[str, Any]) -> None:
    """Another question on a picture does not run the vision tower again."""
    stats = found["stats"]
    # Seven pictures and three clips, some twice in one step.
    assert stats["encoded"] <= 10 + stats["items"] // 10
    assert stats["reused"] > stats["encoded"]


def test_a_ratio_that_comes_too_late_is_refused(found: dict[str, Any]) -> None:
    """With the sampling parameters, when the picture is pruned already; never silently."""
    late = found["late"]
    assert late["same"] == late["words alone"] == ""
    assert "0.25 comes too late" in late["other"] and "processed at 0.5" in late["other"]
    assert "1.0 comes too late" in late["whole"] and "mm_processor_kwargs" in late["whole"]


def test_aborts_leave_nothing_behind(lvlm: Callable[[str], str]) -> None:
    """Aborted at any stage: every KV block is free, no encoder output is referenced."""
    found = in_child(aborted, model=lvlm("llava_next"), family="llava_next")
    aborts = found["aborted"]
    assert min(aborts[stage] for stage in ("waiting", "half computed", "answering")) > 0
    assert found["finished"] == NUM_WITH_ABORTS - sum(aborts.values()) + aborts.get("ended", 0)
    assert min(found["most"].values()) > 0  # there was something to leave
    assert found["after"] == {"used_blocks": 0, "referenced": 0}
