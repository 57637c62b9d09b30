"""Other papers' methods: budgets, and what they do against plain runs."""

from functools import cache
from typing import Any

import pytest
import torch

import tiny_lvlm
from vllm_covipal import hf
from vllm_covipal.baselines import (
    INSIDE,
    OUTSIDE,
    Unreachable,
    fastv,
    inside,
    pooling,
    pyramid_drop,
    sparsevlm,
    visionzip,
)
from vllm_covipal.selectors import build_selector

each_family = pytest.mark.parametrize("family", tiny_lvlm.FAMILIES)


@cache
def _pair(family: str) -> tuple[Any, Any]:
    return tiny_lvlm.FAMILIES[family]()


@cache
def _encoded(family: str) -> hf.EncodedPrompt:
    model, processor = _pair(family)
    prompt = f"USER : {tiny_lvlm.placeholder(family)} what is the color ? ASSISTANT :"
    return hf.encode_prompt(model, processor, prompt, images=[tiny_lvlm.picture(80, 48)])


def _stock(family: str, num_new: int) -> list[int]:
    model, _ = _pair(family)
    whole = hf.prune_prompt(
        model, _encoded(family), keep_ratio=1.0, selector=build_selector("grid")
    )
    return hf.generate_greedy(model, whole, max_new_tokens=num_new)


@each_family
@pytest.mark.parametrize("name", INSIDE)
def test_keeping_everything_is_the_stock_model(family: str, name: str) -> None:
    """At a ratio of 1 no layer loses a token, and the answer is transformers' own."""
    model, _ = _pair(family)
    said, tokens = INSIDE[name](model, _encoded(family), 1.0, 3)
    (item,) = _encoded(family).items
    structure = 0 if item.structure_mask is None else int(item.structure_mask.sum())
    assert said == _stock(family, 3)
    assert tokens == len(item.rows) - structure


@each_family
def test_a_token_dropped_inside_is_a_key_masked_from_there_on(family: str) -> None:
    """Layer 0 sees all, layer 1 does not see the dropped, positions stay."""
    model, _ = _pair(family)
    encoded = _encoded(family)
    (item,) = encoded.items
    embeddings = model.get_input_embeddings()(encoded.prompt_ids).detach().clone()
    embeddings[item.start : item.start + len(item.rows)] = item.rows
    seen: list[torch.Tensor] = []

    def drop(state: inside.LayerState) -> torch.Tensor:
        seen.append(state.visual.clone())
        return torch.arange(0, len(state.visual), 2).flip(0)

    with torch.no_grad():
        got, counts = inside._next_logits(model, encoded, embeddings, drop)
        gone = seen[0][1::2]
        decoder = model.model.language_model
        positions = inside._positions(encoded, len(embeddings))
        rotary = decoder.rotary_emb(embeddings[None], positions)
        mask = torch.full((len(embeddings),) * 2, -torch.inf).triu(1)
        hidden = decoder.layers[0](
            embeddings[None], position_embeddings=rotary, attention_mask=mask[None, None]
        )
        mask[:, gone] = -torch.inf
        mask[gone, gone] = 0  # their own rows must see something
        hidden = decoder.layers[1](
            hidden, position_embeddings=rotary, attention_mask=mask[None, None]
        )
        expected = model.lm_head(decoder.norm(hidden[0, -1:]))[0]
    assert counts == [len(seen[0]), len(seen[0]) - len(gone)]
    assert torch.allclose(got, expected, atol=1e-3, rtol=1e-3)


def test_fastv_keeps_what_the_last_prompt_token_attends_to(monkeypatch: Any) -> None:
    """The choice, read from weights written by hand; new tokens do not shift the row."""
    chosen: list[list[int]] = []

    def answer(model: Any, encoded: Any, drop: Any, num_new: int) -> tuple[list[int], float]:
        attention = torch.zeros(8, 8)
        attention[5, 1:5] = torch.tensor([0.1, 0.4, 0.2, 0.3])
        attention[7, 1:5] = torch.tensor([0.9, 0.0, 0.0, 0.0])
        state = inside.LayerState(torch.zeros(8, 2), torch.arange(1, 5), 6, attention, 2)
        chosen.append(sorted(drop(state).tolist()))
        state.layer_idx = 1
        assert drop(state) is None
        return [], 0.0

    monkeypatch.setattr(inside, "answer", answer)
    fastv.answer(_pair("llava")[0], None, 0.5, 1, is_average=False)  # type: ignore[arg-type]
    assert chosen == [[1, 3]]


@pytest.mark.parametrize("num_layers", [6, 28, 32])
@pytest.mark.parametrize("keep_ratio", [0.5, 0.3])
def test_equal_budgets_are_averages_over_layers(num_layers: int, keep_ratio: float) -> None:
    """Counted layer by layer, for the three methods."""
    share = inside.share_for_average(num_layers, 2, keep_ratio + 0.1)
    assert (2 + (num_layers - 2) * share) / num_layers == pytest.approx(keep_ratio + 0.1)
    share = pyramid_drop.stage_share(num_layers, keep_ratio + 0.1, is_average=True)
    stages = pyramid_drop.stage_layers(num_layers)
    counts = [share ** sum(i >= stage for stage in stages) for i in range(num_layers)]
    assert sum(counts) / num_layers == pytest.approx(keep_ratio + 0.1)
    stages = sparsevlm.stage_layers(num_layers)
    shares = [1.0, *sparsevlm.stage_shares(num_layers, keep_ratio, is_average=True)]
    counts = [shares[sum(i >= stage for stage in stages)] for i in range(num_layers)]
    assert sum(counts) / num_layers == pytest.approx(keep_ratio, abs=1e-6)


def test_a_budget_below_the_first_layers_is_out_of_reach() -> None:
    """Said, not met some other way: two of six layers are a third already."""
    for make in (
        lambda: inside.share_for_average(6, 2, 1 / 3),
        lambda: pyramid_drop.stage_share(8, 0.25, is_average=True),
        lambda: sparsevlm.stage_shares(6, 0.1, is_average=True),
    ):
        with pytest.raises(Unreachable, match="out of reach"):
            make()
    assert pyramid_drop.stage_share(8, 0.125, is_average=False) == pytest.approx(0.5)
    assert sparsevlm.stage_shares(6, 0.5, is_average=False) == [1.0, pytest.approx(10 / 11), 0.5]


def test_raters_are_words_that_look_like_the_picture() -> None:
    """Two visual rows along the first axis: the word along it rates, the others do not."""
    visual = torch.tensor([[3.0, 0, 0], [2.0, 0.1, 0]])
    text = torch.tensor([[0.0, 1, 0], [1.0, 0, 0], [0.0, 0, 1]])
    assert sparsevlm.text_raters(visual, text).tolist() == [False, True, False]


def test_zipping_by_hand() -> None:
    """Two dominant, one target that takes the mean of the other two on top of itself."""
    hidden = torch.tensor([[1.0, 0], [0, 1], [2, 2], [4, 0], [0, 6]])
    attention = torch.tensor([0.1, 0.9, 0.0, 0.5, 0.2])
    zipped = visionzip.zip_tokens(hidden, attention, torch.randn(5, 3), 2, 1)
    # Left: 0, 2, 4; the target is 0, and takes ([2, 2] + [0, 6]) / 2.
    assert zipped.tolist() == [[2, 4], [0, 1], [4, 0]]
    kept = visionzip.zip_tokens(hidden, attention, torch.randn(5, 3), 3, 0)
    assert kept.tolist() == [[0, 1], [4, 0], [0, 6]]
    keys = torch.tensor([[1.0, 0], [0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]])
    two = visionzip.zip_tokens(hidden, torch.tensor([0.0, 9, 0, 0, 0]), keys, 1, 2)
    # Left: 0, 2, 3, 4; targets 0 and 3: 2 goes to 0, 4 to 3.
    assert two.tolist() == [[3, 2], [0, 1], [4, 6]]


@pytest.mark.parametrize("name", OUTSIDE)
def test_outside_methods_meet_their_budget(name: str) -> None:
    """LLaVA's 16 patches; at a ratio of 1, the stock prompt."""
    model, _ = _pair("llava")
    encoded = _encoded("llava")
    whole = OUTSIDE[name](model, encoded, 1.0)
    stock = hf.prune_prompt(model, encoded, keep_ratio=1.0, selector=build_selector("grid"))
    assert torch.allclose(whole.embeddings, stock.embeddings, atol=1e-4)
    half = OUTSIDE[name](model, encoded, 0.5)
    assert stock.embeddings.shape[1] - half.embeddings.shape[1] == 8
    assert hf.generate_greedy(model, half, max_new_tokens=2)
    with pytest.raises(ValueError, match="LLaVA-1.5"):
        OUTSIDE[name](_pair("qwen2_vl")[0], _encoded("qwen2_vl"), 0.5)


def test_pooled_grids() -> None:
    """As many cells as the budget has, then as square as can be."""
    assert pooling.pooled_grid(12, 12, 144) == (12, 12)
    assert pooling.pooled_grid(12, 12, 36) == (6, 6)
    assert pooling.pooled_grid(12, 12, 15) in ((3, 5), (5, 3))
    assert pooling.pooled_grid(4, 4, 1) == (1, 1)
    assert pooling.pooled_grid(2, 8, 4) == (1, 4)
