"""Pruned prompts in transformers, on every family, against what transformers does itself."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_lvlm
from vllm_covipal import hf
from vllm_covipal.core.pruner import PruningModule, PruningModuleConfig
from vllm_covipal.selectors import Selector, build_selector

LANDSCAPE, PORTRAIT = (80, 48), (48, 112)
CASES = {
    "landscape": {"images": [LANDSCAPE]},
    "portrait": {"images": [PORTRAIT]},
    "two": {"images": [LANDSCAPE, PORTRAIT]},
    "video": {"videos": [(4, 48, 32)]},
    "both": {"images": [LANDSCAPE], "videos": [(2, 32, 32)]},
}
WITH_VIDEO = ("llava_onevision", "qwen2_vl", "qwen2_5_vl")
FAMILY_CASES = [
    (family, case)
    for family in tiny_lvlm.FAMILIES
    for case, media in CASES.items()
    if family in WITH_VIDEO or "videos" not in media
]
each_case = pytest.mark.parametrize(("family", "case"), FAMILY_CASES)


@cache
def _pair(family: str) -> tuple[Any, Any]:
    return tiny_lvlm.FAMILIES[family]()


@cache
def _ppm() -> Selector:
    torch.manual_seed(0)
    module = PruningModule(PruningModuleConfig.for_hidden_size(tiny_lvlm.WIDTH)).eval()
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(3)  # untrained, the text hardly matters
    return build_selector("ppm", pruning_module=module)


def _prompt(family: str, case: str, question: str = "what is the color of the red circle ?") -> str:
    media = CASES[case]
    stands = [tiny_lvlm.placeholder(family, "image")] * len(media.get("images", ()))
    stands += [tiny_lvlm.placeholder(family, "video")] * len(media.get("videos", ()))
    return f"USER : {' and '.join(stands)} {question} ASSISTANT :"


def _media(case: str) -> dict[str, list[Any]]:
    media: dict[str, list[Any]] = {}
    for name, sizes in CASES[case].items():
        make = tiny_lvlm.picture if name == "images" else tiny_lvlm.clip
        media[name] = [make(*size, seed=i) for i, size in enumerate(sizes)]
    return media


def _inputs(family: str, case: str) -> Any:
    _, processor = _pair(family)
    return processor(text=[_prompt(family, case)], return_tensors="pt", **_media(case))


def _encoded(family: str, case: str) -> tuple[Any, hf.EncodedPrompt]:
    model, processor = _pair(family)
    return model, hf.encode_prompt(model, processor, _prompt(family, case), **_media(case))


def _kept_mask(encoded: hf.EncodedPrompt, pruned: hf.PrunedPrompt) -> Tensor:
    """True for text and for kept rows, in the expanded prompt. [L]."""
    kept = torch.ones(len(encoded.prompt_ids), dtype=torch.long)
    for item, rows in zip(encoded.items, pruned.kept_rows, strict=True):
        kept[item.start : item.start + len(item.rows)] = 0
        kept[item.start + rows] = 1
    return kept


@each_case
def test_keeping_everything_is_what_transformers_generates(family: str, case: str) -> None:
    """Ratio one: the same tokens as the model's own generate."""
    model, processor = _pair(family)
    inputs = _inputs(family, case)
    stock = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    stock = stock[inputs["input_ids"].shape[1] :].tolist()
    ours = hf.generate_pruned(
        model,
        processor,
        _prompt(family, case),
        keep_ratio=1.0,
        selector=_ppm(),
        max_new_tokens=8,
        **_media(case),
    )
    end = model.generation_config.eos_token_id
    assert ours == [token for token in stock if token != end]


@each_case
def test_dropping_rows_is_masking_their_keys(family: str, case: str) -> None:
    """The pruned prompt's logits are the whole prompt's with the dropped keys hidden.

    With consecutive positions under one-dimensional RoPE; with the unpruned positions of every
    kept token and all text under M-RoPE, as transformers computes them.
    """
    model, encoded = _encoded(family, case)
    pruned = hf.prune_prompt(model, encoded, keep_ratio=0.3, selector=_ppm())
    kept = _kept_mask(encoded, pruned)
    assert 0 < int(kept.sum()) < len(kept)
    assert pruned.embeddings.shape[1] == int(kept.sum())
    given = {"position_ids": pruned.positions} if pruned.positions is not None else {}
    inputs = dict(_inputs(family, case))
    inputs["attention_mask"] = kept.unsqueeze(0)
    if pruned.positions is None:
        inputs["position_ids"] = (kept.cumsum(0) - 1).clamp(min=0).unsqueeze(0)
    else:
        names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        known = {name: inputs[name] for name in names if name in inputs}
        whole, delta = model.model.get_rope_index(inputs["input_ids"], **known)
        inputs["position_ids"] = whole
        assert torch.equal(pruned.positions, whole[:, :, kept.bool()])
        assert pruned.next_position == len(kept) + int(delta)
    with torch.no_grad():
        masked = model(**inputs).logits[0][kept.bool()]
        ours = model(inputs_embeds=pruned.embeddings, **given).logits[0]
    assert torch.allclose(ours, masked, atol=2e-3, rtol=1e-3)


@each_case
def test_kept_rows_reach_the_language_model_unchanged(family: str, case: str) -> None:
    """Bit for bit the projector's rows, ascending, structure in; text in between."""
    model, encoded = _encoded(family, case)
    pruned = hf.prune_prompt(model, encoded, keep_ratio=0.3, selector=_ppm())
    is_text = torch.ones(pruned.embeddings.shape[1], dtype=torch.bool)
    dropped = 0
    for item, rows in zip(encoded.items, pruned.kept_rows, strict=True):
        place = item.start - dropped
        span = slice(place, place + len(rows))
        assert torch.equal(pruned.embeddings[0, span], item.rows[rows])
        is_text[span] = False
        dropped += len(item.rows) - len(rows)
        if item.structure_mask is not None:
            assert set(item.structure_mask.nonzero().flatten().tolist()) <= set(rows.tolist())
    media = torch.zeros(len(encoded.prompt_ids), dtype=torch.bool)
    for item in encoded.items:
        media[item.start : item.start + len(item.rows)] = True
    text = model.get_input_embeddings()(encoded.prompt_ids[~media])
    assert torch.equal(pruned.embeddings[0, is_text], text)


@each_case
def test_grids_hold_the_candidates(family: str, case: str) -> None:
    """Every family knows where its candidates lie in the picture."""
    _, encoded = _encoded(family, case)
    num_media = sum(map(len, CASES[case].values()))
    assert len(encoded.items) == num_media
    for item in encoded.items:
        mask = item.structure_mask
        num_candidates = len(item.rows) - (0 if mask is None else int(mask.sum()))
        assert sum(rows * cols for rows, cols in item.grids) == num_candidates


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_newlines_are_structure(family: str) -> None:
    """A newline a line of the picture, each the model's own embedding."""
    model, encoded = _encoded(family, "landscape")
    (item,) = encoded.items
    assert item.structure_mask is not None
    lines, _ = item.grids[1]
    assert int(item.structure_mask.sum()) == lines > 1
    newline = model.model.image_newline.detach()
    assert all(torch.equal(row, newline) for row in item.rows[item.structure_mask])


@pytest.mark.parametrize("family", tiny_lvlm.FAMILIES)
def test_the_context_is_the_text_of_the_turn(family: str) -> None:
    """No placeholder, no marker, no assistant; the same for a chat that has grown."""
    model, processor = _pair(family)
    prompt = _prompt(family, "two")
    grown = prompt + " blue </s> USER : is the square left ? ASSISTANT :"
    contexts = [
        hf.encode_prompt(model, processor, text, **_media("two")).text_ids
        for text in (prompt, grown)
    ]
    decoded = processor.tokenizer.decode(contexts[0][0])
    assert decoded.endswith("what is the color of the red circle ?")
    assert "ASSISTANT" not in decoded and "<" not in decoded.replace("<unk>", "")
    assert contexts[0][0] == contexts[0][1] == contexts[1][0] == contexts[1][1]


@pytest.mark.parametrize("family", tiny_lvlm.FAMILIES)
def test_another_question_is_another_choice(family: str) -> None:
    """The pruning module sees the question; DivPrune does not."""
    model, processor = _pair(family)
    questions = ["what is the color of the red circle ?", "is blue left of the square ?"]
    questions += ["circle", "blue blue right", "what ?"]
    for selector, differs in ((_ppm(), True), (build_selector("divprune"), False)):
        chosen = {
            tuple(
                hf.select_rows(
                    model,
                    processor,
                    _prompt(family, "landscape", question),
                    keep_ratio=0.4,
                    selector=selector,
                    **_media("landscape"),
                )[0].tolist()
            )
            for question in questions
        }
        assert (len(chosen) > 1) == differs


def test_a_prompt_without_media_is_left_alone() -> None:
    """Text alone: nothing to prune."""
    model, processor = _pair("llava")
    prompt = "USER : what is the color ? ASSISTANT :"
    inputs = processor(text=[prompt], return_tensors="pt")
    stock = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0]
    ours = hf.generate_pruned(
        model, processor, prompt, keep_ratio=0.5, selector=_ppm(), max_new_tokens=4
    )
    assert ours == stock[inputs["input_ids"].shape[1] :].tolist()


def test_other_families_are_refused() -> None:
    """By name, with the list of those that work."""

    class Other:
        class config:  # noqa: N801
            model_type = "idefics3"

    with pytest.raises(ValueError, match=r"one of llava, .*, got 'idefics3'"):
        hf.encode_prompt(Other, None, "")


def test_a_pruning_module_reads_as_much_text_as_it_records() -> None:
    """The last tokens of the question, as in training; other selectors read 128."""
    model, encoded = _encoded("llava", "landscape")
    read: list[int] = []

    class Watching(PruningModule):
        def score_items(self, visual: Any, text: Any) -> list[Tensor]:
            read.extend(len(rows) for rows in text)
            return super().score_items(visual, text)

    for num_tokens in (0, 2):
        config = PruningModuleConfig.for_hidden_size(
            tiny_lvlm.WIDTH, num_heads=2, max_text_tokens=num_tokens
        )
        selector = build_selector("ppm", pruning_module=Watching(config).eval())
        hf.prune_prompt(model, encoded, keep_ratio=0.5, selector=selector)
    assert read == [0, 2]
    assert len(encoded.text_ids[0]) > 2 and build_selector("cdpruner").max_text_tokens == 128
