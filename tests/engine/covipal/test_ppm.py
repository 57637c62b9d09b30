"""A pruning module in the engine: it reads the question, and chooses as its twin does."""

from collections.abc import Callable
from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine

FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl")
QUESTIONS = ("what is red ?", "left or right ?", "what is red ?", "You are blue circle")
PICTURES = [(64, 64, 1), (96, 48, 2)]
KEEP_RATIO = 0.25
MAX_TEXT_TOKENS = 4  # what the module records, and the engine reads unasked


def choices(models: dict[str, str], ppms: dict[str, str]) -> dict[str, Any]:
    """By family, in one process: an engine after the other costs less than a process each."""
    return {family: _choices(models[family], family, ppms[family]) for family in models}


def _choices(model: str, family: str, ppm: str) -> dict[str, Any]:
    """Kept rows of each question: by the engine, all at once, and by transformers."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from engine_probe.lvlm import LvlmAsk, Watch, answer, lvlm_engine, model_of
    from vllm_covipal.core.pruner_files import load_pruning_module
    from vllm_covipal.hf import encode_prompt, visual_items
    from vllm_covipal.selectors import build_selector

    asks = [LvlmAsk(f"@ {words} @", PICTURES) for words in QUESTIONS]
    by_engine = []
    with lvlm_engine(model, family, {"ppm": ppm, "keep_ratio": KEEP_RATIO}) as llm:
        watch = Watch(model_of(llm))
        for ask in asks:
            watch.clear()
            answer(llm, family, [ask], max_tokens=1)
            by_engine.append([index.tolist() for index in watch.indices])
    processor = AutoProcessor.from_pretrained(model)
    lvlm = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    selector = build_selector("ppm", pruning_module=load_pruning_module(ppm))
    by_twin = []
    for ask in asks:
        request = ask.prompt(family)
        images = request["multi_modal_data"]["image"]
        encoded = encode_prompt(lvlm, processor, request["prompt"], images=images)
        items = visual_items(lvlm, encoded, KEEP_RATIO, MAX_TEXT_TOKENS)
        by_twin.append([index.tolist() for index in selector.select(items)])
    return {"engine": by_engine, "twin": by_twin}


@pytest.fixture(scope="module")
def models(lvlm: Callable[[str], str]) -> dict[str, str]:
    """Each family's folder."""
    return {family: lvlm(family) for family in FAMILIES}


@pytest.fixture(scope="module")
def ppms(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """For each a module of random weights."""
    import torch
    from transformers import AutoConfig

    from vllm_covipal.core.fingerprint import fingerprint
    from vllm_covipal.core.pruner import PruningModule, PruningModuleConfig
    from vllm_covipal.core.pruner_files import save_pruning_module

    folders = {family: str(tmp_path_factory.mktemp(f"ppm-{family}")) for family in FAMILIES}
    for family, folder in folders.items():
        torch.manual_seed(0)
        config = PruningModuleConfig.for_hidden_size(
            64,
            num_heads=2,
            max_text_tokens=MAX_TEXT_TOKENS,
            fingerprint=fingerprint(AutoConfig.from_pretrained(models[family])),
            trained_for="tiny",
        )
        module = PruningModule(config)
        with torch.no_grad():
            for weight in module.parameters():
                weight.mul_(4 if weight.dim() >= 2 else 1)  # so that the question tells
        save_pruning_module(module, folder)
    return folders


@pytest.fixture(scope="module")
def by_family(models: dict[str, str], ppms: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Each family's choices."""
    return in_child(choices, models=models, ppms=ppms)


@pytest.fixture(params=FAMILIES)
def found(request: pytest.FixtureRequest, by_family: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One family's choices."""
    return by_family[request.param]


def test_chooses_as_the_twin(found: dict[str, Any]) -> None:
    """Every row of every picture and question; a repeated question is not chosen anew."""
    assert found["engine"][:2] == found["twin"][:2]
    assert found["engine"][3] == found["twin"][3]
    assert found["engine"][2] == []  # served from the encoder cache


def test_another_question_is_another_choice(found: dict[str, Any]) -> None:
    """On the same pictures."""
    assert found["twin"][0] == found["twin"][2] != found["twin"][1]


def read_text(model: str, ppm: str) -> dict[str, list[Any]]:
    """Text tokens that a server reads, and what it warns of, by what it is asked for."""
    import logging

    from vllm.engine.arg_utils import EngineArgs

    from vllm_covipal.engine.options import attached

    found = {}
    for name, asked in (
        ("unasked", {}),
        ("same", {"max_text_tokens": 4}),
        ("other", {"max_text_tokens": 2}),
    ):
        lines: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record, lines=lines: lines.append(record.getMessage())
        logger = logging.getLogger("vllm.covipal")
        logger.addHandler(handler)
        covipal = {"ppm": ppm, "keep_ratio": 0.5} | asked
        args = EngineArgs(model, max_model_len=512, additional_config={"covipal": covipal})
        options = attached(args.create_engine_config().model_config)
        logger.removeHandler(handler)
        found[name] = [options.max_text_tokens if options else None, *lines]
    return found


def test_the_module_s_word_counts_unless_the_user_has_another(
    models: dict[str, str], ppms: dict[str, str]
) -> None:
    """With a warning: it was trained to read so much."""
    found = in_child(read_text, model=models["llava"], ppm=ppms["llava"])
    assert found["unasked"] == found["same"] == [MAX_TEXT_TOKENS]
    length, warning = found["other"]
    assert length == 2 and "max_text_tokens=2" in warning and "trained to read 4" in warning
