"""What training reads off a frozen LVLM, on every family, against what transformers does itself."""

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch

import tiny_lvlm
from vllm_covipal import hf
from vllm_covipal.core.soft_mask import DROPPED, RETENTION_FLOOR, retention_bias
from vllm_covipal.selectors import build_selector
from vllm_covipal.training import lvlm
from vllm_covipal.training.batches import Batch, make_batch, without_tokens
from vllm_covipal.training.encode import EncodedSample, Encoder, answered, chat_prompt
from vllm_covipal.training.recipe import Stage1Recipe, Stage2Recipe
from vllm_covipal.training.samples import Sample, Turn
from vllm_covipal.training.stages import guide_labels, score_batch, stage2_positions

TURNS = (
    Turn("<image>\nwhat is the color ?", "blue circle"),
    Turn("<image>\nis red left of the square ?", "right"),
)
each_family = pytest.mark.parametrize("family", tiny_lvlm.FAMILIES)


@cache
def _pair(family: str) -> tuple[Any, Any]:
    model, processor = tiny_lvlm.FAMILIES[family]()
    return model.requires_grad_(False), processor


@cache
def _sample(num_images: int = 1) -> Sample:
    images = tuple(tiny_lvlm.picture(80, 48 + 16 * i, seed=i) for i in range(num_images))
    turns = TURNS if num_images == 1 else (Turn("<image>\n<image>\nwhat is left ?", "red"),)
    return Sample("s", images, turns)


def _encoded(family: str, num_images: int = 1) -> EncodedSample:
    model, processor = _pair(family)
    encoder = Encoder(model, processor, max_text_tokens=128, max_answer_tokens=8)
    sample = _sample(num_images)
    return encoder(sample, sample.turns)


def _logits(family: str, batch: Batch, key_bias: torch.Tensor) -> list[torch.Tensor]:
    """Of each question, at every token. [L, vocabulary]."""
    model, _ = _pair(family)
    mask = lvlm.biased_mask(batch.allowed, key_bias, batch.embeddings.dtype)
    found = []
    for question in batch.questions:
        where = torch.stack(
            [torch.full_like(question.tokens, question.row), question.tokens], dim=1
        )
        found.append(lvlm.answer_logits(model, batch.embeddings, batch.positions, mask, where))
    return found


def _no_bias(batch: Batch) -> torch.Tensor:
    return torch.zeros(batch.embeddings.shape[:2])


@each_family
@pytest.mark.parametrize("num_images", [1, 2])
def test_a_sequence_is_the_processors(family: str, num_images: int) -> None:
    """Prompt tokens as the processor makes them, the answer and the turn's end behind."""
    model, processor = _pair(family)
    sample, encoded = _sample(num_images), _encoded(family, num_images)
    for turn, sequence in zip(sample.turns, encoded.sequences, strict=True):
        images = tiny_lvlm.placeholder(family) + " "
        words = turn.question.replace("<image>\n", "")
        prompt = f"USER : {images * num_images}{words}  ASSISTANT : "
        ids = processor(text=[prompt], images=list(sample.images), return_tensors="pt")["input_ids"]
        assert sequence.ids[: sequence.num_prompt].tolist() == ids[0].tolist()
        answer = processor.tokenizer.decode(sequence.ids[sequence.num_prompt :])
        assert answer.split()[: len(turn.answer.split())] == turn.answer.split()


@each_family
def test_the_module_never_sees_the_answer(family: str) -> None:
    """Another answer changes the sequence and nothing that the module gets."""
    model, processor = _pair(family)
    encoder = Encoder(model, processor, max_text_tokens=128, max_answer_tokens=8)
    seen = []
    for answer in ("blue circle", "red", "USER : what"):
        turn = Turn("<image>\nwhat is the color ?", answer)
        batch = make_batch(model, [encoder(_sample(), [turn])], share_pictures=False)
        given: list[Any] = []

        def scorer(visual: Any, text: Any, given: list[Any] = given) -> torch.Tensor:
            given += [*visual, *text]
            return torch.zeros(sum(len(rows) for rows in visual))

        score_batch(model, scorer, batch)
        seen.append((batch.embeddings.shape[1], given))
    assert len({length for length, _ in seen}) > 1
    for _, given in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(given, seen[0][1], strict=True))


@each_family
@pytest.mark.parametrize("num_images", [1, 2])
def test_full_retention_changes_nothing(family: str, num_images: int) -> None:
    """p = 1: the logits of the model as transformers runs it, pictures and all."""
    model, processor = _pair(family)
    encoded = _encoded(family, num_images)
    batch = make_batch(model, [encoded], share_pictures=False)
    ones = torch.ones(batch.embeddings.shape[:2])
    for turn, sequence, logits in zip(
        _sample(num_images).turns,
        encoded.sequences,
        _logits(family, batch, retention_bias(ones)),
        strict=True,
    ):
        prompt = chat_prompt(processor, turn.question, num_images)
        images = list(_sample(num_images).images)
        inputs = processor(text=[prompt], images=images, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == sequence.ids[: sequence.num_prompt].tolist()
        stock = model(**inputs).logits[0]
        assert torch.allclose(logits[: sequence.num_prompt], stock, atol=2e-3, rtol=1e-3)


@each_family
def test_no_retention_is_deletion_with_positions_kept(family: str) -> None:
    """p -> 0 of some visual keys: every other token's logits are those without these tokens."""
    model, _ = _pair(family)
    batch = make_batch(model, [_encoded(family)], share_pictures=False)
    question = batch.questions[0]
    start = question.sequence.starts[0]
    gone = torch.arange(start, question.sequence.media_end)[1::3]
    bias = _no_bias(batch)
    bias[0, gone] = -torch.inf  # retention_bias stops at a floor, tested below
    with_bias = _logits(family, batch, bias)[0]
    left = torch.ones(len(question.tokens), dtype=torch.bool)
    left[gone] = False
    kept = question.tokens[left]
    positions = batch.positions[..., 0, kept].unsqueeze(-2)
    allowed = batch.allowed[:1][:, :, kept][:, :, :, kept]
    where = torch.stack([torch.zeros_like(kept), torch.arange(len(kept))], dim=1)
    mask = lvlm.biased_mask(allowed, torch.zeros(1, len(kept)), torch.float32)
    deleted = lvlm.answer_logits(model, batch.embeddings[:1, kept], positions, mask, where)
    assert torch.allclose(with_bias[left], deleted, atol=2e-3, rtol=1e-3)
    stock = _logits(family, batch, _no_bias(batch))[0]
    assert not torch.allclose(with_bias[left], stock[left], atol=1e-1)
    floored = _no_bias(batch)
    floored[0, gone] = retention_bias(torch.zeros(len(gone)))
    assert float(floored.exp().min()) == pytest.approx(RETENTION_FLOOR)


@each_family
def test_a_hard_choice_in_stage_2_is_the_served_prompt(family: str) -> None:
    """Dropped keys and stage 2's positions: the logits of the prompt that serving makes."""
    model, processor = _pair(family)
    sample, turn = _sample(), TURNS[0]
    batch = make_batch(model, [_encoded(family)], share_pictures=False)
    prompt = chat_prompt(processor, turn.question, 1)
    encoded = hf.encode_prompt(model, processor, prompt, images=list(sample.images))
    selector = build_selector("random", seed=3)
    pruned = hf.prune_prompt(model, encoded, keep_ratio=0.3, selector=selector)
    assert pruned.embeddings.shape[1] < len(encoded.prompt_ids)
    question = batch.questions[0]
    start = question.sequence.starts[0]
    bias = _no_bias(batch)
    bias[0, start : start + len(encoded.items[0].rows)] = DROPPED
    bias[0, start + pruned.kept_rows[0]] = 0
    last = torch.tensor([[0, question.sequence.num_prompt - 1]])
    mask = lvlm.biased_mask(batch.allowed, bias, batch.embeddings.dtype)

    def at(positions: torch.Tensor) -> torch.Tensor:
        return lvlm.answer_logits(model, batch.embeddings, positions, mask, last)[0]

    given = {} if pruned.positions is None else {"position_ids": pruned.positions}
    served = model(inputs_embeds=pruned.embeddings, logits_to_keep=1, **given).logits[0, -1]
    here = at(stage2_positions(batch, bias, Stage2Recipe(num_steps=1)))
    assert torch.allclose(here, served, atol=2e-3, rtol=1e-3)
    if pruned.positions is None:
        original = stage2_positions(batch, bias, Stage2Recipe(num_steps=1, positions="original"))
        assert torch.equal(original, batch.positions)
        assert not torch.allclose(at(original), served, atol=2e-3, rtol=1e-3)


@each_family
def test_tokens_that_left_need_not_be_computed(family: str) -> None:
    """Rows without the keys that are gone, more of one than of the other: the same logits."""
    model, _ = _pair(family)
    batch = make_batch(model, [_encoded(family)], share_pictures=False)
    bias = _no_bias(batch)
    for question, step in zip(batch.questions, (2, 3), strict=True):
        start, end = question.sequence.starts[0], question.sequence.media_end
        bias[question.row, start:end:step] = DROPPED
        bias[question.row, start + 1 : end : 2 * step] = -1.5
    positions = stage2_positions(batch, bias, Stage2Recipe(num_steps=1))
    short = without_tokens(batch, positions, bias, bias == DROPPED)
    assert short.embeddings.shape[1] < batch.embeddings.shape[1]
    whole_mask, short_mask = (
        lvlm.biased_mask(b.allowed, key_bias, torch.float32)
        for b, key_bias in ((batch, bias), (short, short.key_bias))
    )
    for question in batch.questions:
        left = bias[question.row, question.tokens] == DROPPED
        tokens = question.tokens[~left]
        rows = torch.full_like(tokens, question.row)
        where = torch.stack([rows, tokens], dim=1)
        whole = lvlm.answer_logits(model, batch.embeddings, positions, whole_mask, where)
        where = torch.stack([rows, short.place[rows, tokens]], dim=1)
        assert torch.allclose(
            lvlm.answer_logits(model, short.embeddings, short.positions, short_mask, where),
            whole,
            atol=2e-3,
            rtol=1e-3,
        )


@each_family
def test_questions_share_a_picture_without_seeing_each_other(family: str) -> None:
    """One packed row gives each question the logits of its own row."""
    model, _ = _pair(family)
    encoded = _encoded(family)
    packed = make_batch(model, [encoded], share_pictures=True)
    apart = make_batch(model, [encoded], share_pictures=False)
    assert packed.embeddings.shape[0] == 1 and apart.embeddings.shape[0] == len(TURNS)
    for a, b in zip(
        _logits(family, packed, _no_bias(packed)),
        _logits(family, apart, _no_bias(apart)),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=2e-3, rtol=1e-3)


@each_family
@pytest.mark.parametrize("layer_idx", [0, 1])
@pytest.mark.parametrize("rows", ["literal", "after", "last"])
def test_labels_are_the_layers_own_attention(family: str, layer_idx: int, rows: str) -> None:
    """Against the weights that transformers' eager attention returns, summed by hand."""
    model, _ = _pair(family)
    encoded = _encoded(family)
    batch = make_batch(model, [encoded], share_pictures=True)
    guide = lvlm.guide_attention(model, batch.embeddings, batch.positions, batch.allowed, layer_idx)
    assert guide.keys.shape[1] == 1 and guide.queries.shape[1] == 2  # grouped-query attention
    recipe = Stage1Recipe(num_steps=1, rows=rows, scaling="none")
    for i, question in enumerate(batch.questions):
        sequence = question.sequence
        columns = torch.arange(sequence.starts[0], sequence.media_end)
        alone = EncodedSample(encoded.items, (encoded.sequences[i],))
        own = make_batch(model, [alone], share_pictures=False)
        weights = _eager_weights(model, own, layer_idx)
        num_visual = len(encoded.items[0].rows)
        summed = {
            "literal": range(max(0, len(sequence.ids) - num_visual), len(sequence.ids)),
            "after": range(sequence.media_end, len(sequence.ids)),
            "last": range(sequence.num_prompt - 1, sequence.num_prompt),
        }[rows]
        expected = sum(weights[:, row].sum(0) for row in summed)[columns]
        got = guide_labels(guide, question, columns, recipe)
        assert torch.allclose(got, expected, atol=2e-4, rtol=1e-3)


def _eager_weights(model: Any, batch: Batch, layer_idx: int) -> torch.Tensor:
    """[H, T, T] of the only row."""
    text = lvlm.decoder(model)
    before = text.config._attn_implementation
    text.set_attn_implementation("eager")
    try:
        mask = lvlm.biased_mask(
            batch.allowed, torch.zeros(batch.embeddings.shape[:2]), torch.float32
        )
        output = text(
            inputs_embeds=batch.embeddings,
            position_ids=batch.positions,
            attention_mask=mask,
            use_cache=False,
            output_attentions=True,
        )
    finally:
        text.set_attn_implementation(before)
    return output.attentions[layer_idx][0]


@each_family
def test_the_guide_layer_leaves_the_model_as_it_was(family: str) -> None:
    """The same logits before and after, and the layers above did not run."""
    model, _ = _pair(family)
    batch = make_batch(model, [_encoded(family)], share_pictures=False)
    before = _logits(family, batch, _no_bias(batch))[0]
    ran: list[int] = []
    handle = lvlm.decoder(model).layers[1].register_forward_hook(lambda *_: ran.append(1))
    lvlm.guide_attention(model, batch.embeddings, batch.positions, batch.allowed, 0)
    handle.remove()
    assert not ran
    assert torch.equal(before, _logits(family, batch, _no_bias(batch))[0])


def test_a_sample_that_the_processor_refuses_is_named() -> None:
    """Hours into a run: which one, and why."""
    model, processor = _pair("qwen2_vl")
    encoder = Encoder(model, processor, max_text_tokens=128, max_answer_tokens=8)
    narrow = dataclasses.replace(_sample(), name="a, line 3", images=(tiny_lvlm.picture(500, 1),))
    with pytest.raises(ValueError, match=r"^a, line 3: absolute aspect ratio"):
        encoder(narrow, narrow.turns)
    literal = dataclasses.replace(_sample(), name="b", turns=(Turn("<|image_pad|> ?", "red"),))
    with pytest.raises(ValueError, match=r"^b: <\|image_pad\|> in a text"):
        encoder(literal, literal.turns)


def test_a_template_of_the_tokenizer_alone_is_used() -> None:
    """As a server does where the processor has none; without any, the placeholder and the words."""
    _, processor = tiny_lvlm.FAMILIES["llava"]()
    template = processor.chat_template
    with_one = chat_prompt(processor, "what is left ?", 1), answered(processor, TURNS[0], 1)
    processor.chat_template = None
    assert chat_prompt(processor, "what ?", 1) == "<image>\nwhat ?"
    processor.tokenizer.chat_template = template
    assert (
        chat_prompt(processor, "what is left ?", 1),
        answered(processor, TURNS[0], 1),
    ) == with_one
    assert "USER" in with_one[0]
