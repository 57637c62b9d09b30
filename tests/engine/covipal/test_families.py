"""Each family in a real engine: off is stock, and pruning is exactly the rows that were chosen."""

from collections.abc import Callable
from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine

FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl")
MROPE = ("qwen2_vl", "qwen2_5_vl")
RATIOS = (0.5, 0.25, 0.1)
CACHED = "qwen2_5_vl"
WORDS, OTHER_WORDS = "left or blue square", "right is blue circle"

LANDSCAPE, PORTRAIT, SQUARE = (96, 48, 1), (48, 96, 2), (64, 64, 3)
CLIP = (4, 64, 48, 5)


def asks(family: str, keep_ratio: float | None = None) -> list[Any]:
    """One picture, another shape, two pictures, none; a clip where the family has them."""
    from engine_probe.lvlm import VIDEO_FAMILIES, LvlmAsk

    chosen = [
        LvlmAsk("@ what is the color of red circle ?", [LANDSCAPE], keep_ratio=keep_ratio),
        LvlmAsk("Hello @ what ?", [PORTRAIT], keep_ratio=keep_ratio),
        LvlmAsk("@ left @ right what is blue ?", [PORTRAIT, SQUARE], keep_ratio=keep_ratio),
        LvlmAsk("what is the color ?"),
    ]
    if family in VIDEO_FAMILIES:
        chosen.append(LvlmAsk("You & what is red ?", clips=[CLIP], keep_ratio=keep_ratio))
    return chosen


def recurring(words: str, keep_ratio: float | None = None) -> list[Any]:
    """Longer than a block of the prefix cache, a picture or a clip across its end; none twice."""
    from engine_probe.lvlm import LvlmAsk

    text = f"what is the color of red ? Hello {words} @ {words} "
    return [
        LvlmAsk(text + "@ left ?", [LANDSCAPE, PORTRAIT], keep_ratio=keep_ratio),
        LvlmAsk(text + "@ left ?", [SQUARE, (96, 48, 6)], keep_ratio=keep_ratio),
        LvlmAsk(text + "& left ?", [(48, 96, 7)], clips=[CLIP], keep_ratio=keep_ratio),
    ]


def plugin_free(model: str, family: str) -> dict[str, Any]:
    """Answers of a vLLM that loads no plugin; and the positions of each prompt alone."""
    import sys

    from engine_probe.lvlm import Watch, answer, lvlm_engine, model_of

    with lvlm_engine(model, family, None, enable_prefix_caching=False) as llm:
        together = answer(llm, family, asks(family))
        watch = Watch(model_of(llm))

        def positions(ask: Any) -> list[Any]:
            watch.clear()
            answer(llm, family, [ask], max_tokens=2)
            return [step.tolist() for step in watch.positions]

        alone = [positions(ask) for ask in asks(family)]
        again = [*recurring(WORDS), *recurring(OTHER_WORDS)] if family == CACHED else []
        recurred = [positions(ask)[0] for ask in again]
    loaded = [name for name in sys.modules if name.startswith(("vllm_covipal", "vllm_spindle_"))]
    return {"answers": together, "positions": alone, "recurring": recurred, "loaded": loaded}


def pruned(model: str, family: str) -> dict[str, Any]:
    """Answers with covipal on, unset and at 1.0; then every pruned request, looked into."""
    from engine_probe.lvlm import Watch, answer, lvlm_engine, model_of

    options = {"selector": "cdpruner", "reuse_mib": 0}
    with lvlm_engine(model, family, options, enable_prefix_caching=False) as llm:
        found: dict[str, Any] = {
            "unset": answer(llm, family, asks(family)),
            "one": answer(llm, family, asks(family, 1.0)),
        }
        watch = Watch(model_of(llm))
        found["requests"] = {
            str(ratio): [
                _look(llm, family, watch, ask) for ask in asks(family, ratio) if "@" in ask.words
                or "&" in ask.words
            ]
            for ratio in RATIOS
        }  # fmt: skip
    if family == CACHED:
        found["recurring"] = _recurring(model, family)
    found["twin"] = _twin_indices(model, family)
    return found


def _look(llm: Any, family: str, watch: Any, ask: Any) -> dict[str, Any]:
    import torch

    from engine_probe.lvlm import answer

    watch.clear()
    answered = answer(llm, family, [ask], max_tokens=2)[0]
    first_step = watch.embeddings[0][: answered["prompt_len"]]
    rows = torch.cat([r[i] for r, i in zip(watch.encoded, watch.indices, strict=True)])
    places = _is_visual(llm, family, ask, watch.indices)
    return {
        "prompt_len": answered["prompt_len"],
        "expected_len": len(places),
        "bit_equal": bool(torch.equal(first_step[torch.tensor(places)], rows)),
        "num_rows": [len(r) for r in watch.encoded],
        "indices": [i.tolist() for i in watch.indices],
        "is_visual": places,
        "positions": [step.tolist() for step in watch.positions],
    }


def _is_visual(llm: Any, family: str, ask: Any, indices: list[Any]) -> list[bool]:
    """Which tokens of the pruned prompt stand for rows."""
    places: list[bool] = []
    lengths = iter(map(len, indices))
    for token in llm.get_tokenizer().encode(ask.prompt(family)["prompt"]):
        places += [True] * next(lengths) if token in _placeholders(family) else [False]
    return places


def _recurring(model: str, family: str) -> list[dict[str, Any]]:
    """In chunks of 16, every cache on: each question twice, then another on the same pictures."""
    import torch

    from engine_probe.lvlm import Watch, answer, lvlm_engine, model_of

    chunks = {"max_num_batched_tokens": 16, "max_num_seqs": 4}
    with lvlm_engine(model, family, {"selector": "cdpruner"}, **chunks) as llm:
        watch = Watch(model_of(llm))

        def look(ask: Any, first: dict[str, Any] | None = None) -> dict[str, Any]:
            watch.clear()
            answered = answer(llm, family, [ask], max_tokens=1)[0]
            chosen = {
                "num_rows": [len(r) for r in watch.encoded],
                "indices": [i.tolist() for i in watch.indices],
            }
            known = first or chosen
            return {
                "num_rows": known["num_rows"],
                "indices": known["indices"],
                "is_visual": _is_visual(llm, family, ask, known["indices"]),
                "chosen": chosen["indices"],
                "prompt_len": answered["prompt_len"],
                "chunks": [step.shape[-1] for step in watch.positions],
                "positions": torch.cat(watch.positions, dim=-1).tolist(),
            }

        found = []
        for ask, other in zip(recurring(WORDS, 0.5), recurring(OTHER_WORDS, 0.5), strict=True):
            first = look(ask)
            found.append({"first": first, "again": look(ask, first), "other": look(other)})
    return found


def _placeholders(family: str) -> list[int]:
    import tiny_lvlm

    names = ("<|image_pad|>", "<|video_pad|>") if family in MROPE else ("<image>", "<video>")
    return [tiny_lvlm.IDS[name] for name in names]


def _twin_indices(model: str, family: str) -> dict[str, Any]:
    """The transformers twin's choice for the same requests."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vllm_covipal.hf import encode_prompt, visual_items
    from vllm_covipal.selectors import build_selector

    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(model)
    lvlm = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    selector = build_selector("cdpruner")
    found: dict[str, Any] = {}
    for ratio in RATIOS:
        found[str(ratio)] = []
        for ask in asks(family, ratio):
            request = ask.prompt(family)
            if "multi_modal_data" not in request:
                continue
            media = request["multi_modal_data"]
            clips = [c[0] if isinstance(c, tuple) else c for c in media.get("video", ())]
            encoded = encode_prompt(
                lvlm, processor, request["prompt"], images=media.get("image"), videos=clips or None
            )
            items = visual_items(lvlm, encoded, ratio)
            found[str(ratio)].append([index.tolist() for index in selector.select(items)])
    return found


@pytest.fixture(scope="module", params=FAMILIES)
def found(request: pytest.FixtureRequest, lvlm: Callable[[str], str]) -> dict[str, Any]:
    """What both engines said for one family."""
    family = request.param
    arguments = {"model": lvlm(family), "family": family}
    return {
        "family": family,
        "stock": in_child(plugin_free, env={"VLLM_PLUGINS": ""}, **arguments),
        "covipal": in_child(pruned, **arguments),
    }


def test_unset_and_one_are_stock(found: dict[str, Any]) -> None:
    """Asked for nothing, or for all tokens: tokens and log-probabilities of plugin-free vLLM."""
    assert found["stock"]["loaded"] == []
    assert found["covipal"]["unset"] == found["stock"]["answers"]
    assert found["covipal"]["one"] == found["stock"]["answers"]


def test_rows_that_reach_the_language_model_are_the_chosen_ones(found: dict[str, Any]) -> None:
    """Bit for bit the encoder's rows at ascending indices, as many as placeholders."""
    for ratio, requests in found["covipal"]["requests"].items():
        for request in requests:
            assert request["prompt_len"] == request["expected_len"]
            assert request["bit_equal"]
            for num_rows, indices in zip(request["num_rows"], request["indices"], strict=True):
                assert indices == sorted(set(indices))
                assert len(indices) < num_rows * (float(ratio) + 0.35)


def test_the_transformers_twin_chooses_the_same_rows(found: dict[str, Any]) -> None:
    """Every index of every request, selector cdpruner, which reads the text."""
    for ratio, requests in found["covipal"]["requests"].items():
        assert [request["indices"] for request in requests] == found["covipal"]["twin"][ratio]


def test_positions_are_the_unpruned_ones(found: dict[str, Any]) -> None:
    """M-RoPE: text, kept tokens and generated tokens stand where they stand unpruned."""
    if found["family"] not in MROPE:
        pytest.skip("one-dimensional RoPE: kept tokens follow one another")
    with_media = [p for p in found["stock"]["positions"] if p is not None]
    stock = [with_media[i] for i in (0, 1, 2, 4)]
    for requests in found["covipal"]["requests"].values():
        for request, (prompt, generated) in zip(requests, stock, strict=True):
            kept = _kept_columns(request, len(prompt[0]))
            expected = [[axis[i] for i in kept] for axis in prompt]
            num = request["prompt_len"]
            assert [axis[:num] for axis in request["positions"][0]] == expected
            assert [axis[:1] for axis in request["positions"][1]] == [a[:1] for a in generated]


def test_positions_in_chunks_and_from_caches(found: dict[str, Any]) -> None:
    """Pictures cut by chunks and by the prefix cache: each token where it stands unpruned."""
    if found["family"] != CACHED:
        pytest.skip(f"looked at for {CACHED}")
    stock = found["stock"]["recurring"]
    num_cut = 0
    for i, of_ask in enumerate(found["covipal"]["recurring"]):
        for name, request in of_ask.items():
            prompt = stock[i + len(stock) // 2] if name == "other" else stock[i]
            place = num_cached = request["prompt_len"] - sum(request["chunks"])
            kept = _kept_columns(request, len(prompt[0]))[num_cached:]
            assert request["positions"] == [[axis[k] for k in kept] for axis in prompt]
            assert max(request["chunks"]) <= 16
            for length in request["chunks"]:
                num_cut += place > 0 and all(request["is_visual"][place - 1 : place + 1])
                place += length
            assert (num_cached > 0) == (name == "again")
        assert len(of_ask["first"]["chosen"]) == len(of_ask["other"]["chosen"]) == 2
        assert len(of_ask["again"]["chosen"]) < 2  # the encoder cache has the rest
    assert num_cut >= 6


def _kept_columns(request: dict[str, Any], num_unpruned: int) -> list[int]:
    """Columns of the unpruned prompt that the pruned one keeps."""
    columns, place, visual = [], 0, request["is_visual"]
    items = iter(zip(request["num_rows"], request["indices"], strict=True))
    i = 0
    while i < len(visual):
        if not visual[i]:
            columns.append(place)
            place, i = place + 1, i + 1
        else:
            num_rows, indices = next(items)
            columns += [place + index for index in indices]
            place, i = place + num_rows, i + len(indices)
    assert place == num_unpruned
    return columns
