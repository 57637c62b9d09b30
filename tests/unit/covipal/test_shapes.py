"""The shapes questions: what makes a number measured on them worth something."""

import random
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vllm_covipal.evaluation import scenes, shapes

SHIPPED = Path(__file__).parents[3] / "models" / "shapes"
NAME = r"(column \w row \d+|the (?:\w+ )?\w+)"
FORMS = {
    "color": rf"what color is (?:at )?{NAME}",
    "shape": rf"what shape is (?:at )?{NAME}",
    "letter": rf"what letter is (?:at|on) {NAME}",
    "row": rf"what row is {NAME} in",
    "column": rf"what column is {NAME} in",
    "relation": rf"is {NAME} (left of|right of|above|below) {NAME}",
    "shared color": rf"what color do {NAME} and {NAME} share",
    "shared shape": rf"what shape do {NAME} and {NAME} share",
    "count color": r"how many (\w+) objects are there",
    "count shape": r"how many (\w+) are there",
    "exists": r"is there any (\w+) (\w+)",
}


@pytest.fixture
def recipe(monkeypatch):
    """The recipe's folder on the path; models/needle has modules of the same names."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(SHIPPED))
    names = [file.stem for file in SHIPPED.glob("*.py")]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    yield
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.fixture(scope="module")
def questions():
    return shapes.make_questions(800, seed=3)


def named(scene: scenes.Scene, name: str) -> scenes.Thing:
    """The one thing of that name, by reading the name alone."""
    place = re.fullmatch(r"column (\w) row (\d+)", name)
    found = []
    for thing in scene.things:
        column, row = int(thing.x) // 12, int(thing.y) // 12
        if place:
            is_it = "abcdefghijkl"[column] == place[1] and row + 1 == int(place[2])
        else:
            words = set(name.split()[1:]) - {"object"}
            is_it = words <= {thing.color, thing.shape, thing.letter}
        if is_it:
            found.append(thing)
    assert len(found) == 1, name
    return found[0]


def worked_out(question: shapes.Question) -> str:
    """The answer, from the question's text and the things' attributes alone."""
    parts = re.fullmatch(FORMS[question.kind] + r"\?", question.text).groups()
    things = question.scene.things
    if question.kind.startswith("count"):
        words = [thing.color if "color" in question.kind else thing.shape for thing in things]
        plural = {"crosses": "cross"}.get(parts[0], parts[0].removesuffix("s"))
        return str(words.count(parts[0] if "color" in question.kind else plural))
    if question.kind == "exists":
        return "yes" if parts in [(thing.color, thing.shape) for thing in things] else "no"
    one = named(question.scene, parts[0])
    if question.kind == "relation":
        other = named(question.scene, parts[2])
        holds = {
            "left of": one.x < other.x,
            "right of": one.x > other.x,
            "above": one.y < other.y,
            "below": one.y > other.y,
        }[parts[1]]
        return "yes" if holds else "no"
    if question.kind.startswith("shared"):
        other = named(question.scene, parts[1])
        attribute = question.kind.split()[1]
        is_shared = getattr(one, attribute) == getattr(other, attribute)
        return getattr(one, attribute) if is_shared else "none"
    if question.kind == "row":
        return str(int(one.y) // 12 + 1)
    if question.kind == "column":
        return "abcdefghijkl"[int(one.x) // 12]
    return getattr(one, question.kind)


def test_answers_are_right(questions):
    """Another reading of question and scene comes to the same answer, and every kind is there."""
    assert [question.answer for question in questions] == [*map(worked_out, questions)]
    assert {question.kind for question in questions} == set(FORMS)


def test_types_come_in_turn(questions):
    """As many questions of each type."""
    counts = Counter(question.type for question in questions)
    assert counts == dict.fromkeys(shapes.TYPES, 200)


def test_a_guess_does_not_help(questions):
    """No answer of a type is right often enough to be worth guessing."""
    for type, most in (("single", 0.2), ("marks", 0.15), ("several", 0.35), ("whole", 0.35)):
        answers = Counter(question.answer for question in questions if question.type == type)
        assert answers.most_common(1)[0][1] <= most * 200, type


def test_asked_cells_are_where_the_answer_is(questions):
    """The things of ``asked`` alone give the same answer, and no fewer do for one or two."""
    for question in questions:
        alone = replace(
            question.scene, things=tuple(question.scene.things[i] for i in question.asked)
        )
        assert worked_out(replace(question, scene=alone)) == question.answer
        num_asked = {"single": 1, "marks": 1, "several": 2}.get(question.type)
        assert num_asked in (None, len(question.asked))


@pytest.mark.parametrize("seed", range(20))
def test_a_thing_is_seen_in_its_cells_and_in_no_other(seed):
    """Repainting one thing changes pixels of its cells only, most of them in its own cell."""
    scene = scenes.make_scene(seed)
    before = np.asarray(scenes.draw(scene)).astype(int)
    for i, thing in enumerate(scene.things):
        color = "red" if thing.color != "red" else "cyan"
        things = (*scene.things[:i], replace(thing, color=color), *scene.things[i + 1 :])
        after = np.asarray(scenes.draw(replace(scene, things=things))).astype(int)
        changed = np.abs(after - before).max(-1).reshape(12, 12, 12, 12).sum((1, 3)).reshape(-1)
        assert set(np.nonzero(changed)[0]) <= set(scenes.coverage(thing))
        assert changed.argmax() == thing.cell
        assert thing.cell == next(iter(scenes.coverage(thing)))


@pytest.mark.parametrize("seed", range(20))
def test_scenes_are_cluttered(seed):
    """Eight things or more, no two in one cell or of one letter, letters inside their cell."""
    things = scenes.make_scene(seed).things
    assert 8 <= len(things) <= 14
    assert len({thing.cell for thing in things}) == len(things)
    letters = [thing.letter for thing in things if thing.letter is not None]
    assert len(set(letters)) == len(letters) >= 1
    for thing in things:
        for centre, half_glyph in ((thing.x, 2.5), (thing.y, 3.5)):
            first = round(centre - half_glyph)
            assert first // 12 == (first + 2 * half_glyph - 1) // 12 == centre // 12


def test_a_seed_repeats_and_another_does_not():
    """Same arguments, same questions and same pixels; another seed shares no scene."""
    first, again = (shapes.make_questions(12, seed=4) for _ in range(2))
    assert first == again
    for one, other in zip(first, again, strict=True):
        assert scenes.draw(one.scene).tobytes() == scenes.draw(other.scene).tobytes()
    other = shapes.make_questions(12, seed=5)
    assert not {q.scene.seed for q in first} & {q.scene.seed for q in other}


def test_held_out_scenes_are_never_trained_on(questions, recipe):
    """Training draws its scenes below a seed, held-out questions above it."""
    import batches

    assert min(question.scene.seed for question in questions) >= batches.NUM_SEEDS


def test_shipped_processor_is_the_built_one():
    """The files in models/shapes say the same as the code, and no word is unknown."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoProcessor.from_pretrained(SHIPPED)
    tokenizer = processor.tokenizer
    assert tokenizer.convert_ids_to_tokens(range(len(shapes.VOCAB))) == list(shapes.VOCAB)
    for question in shapes.make_questions(40, seed=6):
        ids = tokenizer(f"{question.prompt} {question.answer}").input_ids
        assert tokenizer.unk_token_id not in ids
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        chat = [{"role": "user", "content": content}]
        assert processor.apply_chat_template(chat, add_generation_prompt=True) == question.prompt


def test_the_processor_leaves_pixels_alone(recipe):
    """What the server's processor makes of a picture is what training saw."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import batches

    scene = scenes.make_scene(8)
    processor = transformers.AutoProcessor.from_pretrained(SHIPPED)
    inputs = processor(images=scenes.draw(scene), text=shapes.PROMPT, return_tensors="pt")
    assert torch.allclose(inputs["pixel_values"], batches.pixels_of([scene]), atol=1e-6)
    assert (inputs["input_ids"] == shapes.VOCAB.index(shapes.IMAGE)).sum() == scenes.NUM_CELLS


def test_a_question_in_a_packed_row_is_the_prompt_of_a_server(recipe):
    """The training row's logits at an answer are those of the question's own, plain prompt."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import batches

    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        SHIPPED, dtype=torch.float32
    ).eval()
    rng = random.Random(3)
    weights = dict.fromkeys(shapes.TYPES, 1.0)
    rows = batches.make_rows(rng, batches.draw_scenes(rng, 4), weights)
    tokens = torch.randn(4, scenes.NUM_CELLS, 192, generator=torch.Generator().manual_seed(0))
    embeds = model.get_input_embeddings()(rows.ids)
    kept = tokens[rows.kept[:, 0], rows.kept[:, 1]]
    embeds = embeds.masked_scatter(rows.visual[:, :, None], kept).detach()
    language_model = model.model.language_model
    with torch.inference_mode():
        packed = language_model(
            inputs_embeds=embeds, position_ids=rows.positions, attention_mask=rows.allowed
        ).last_hidden_state
        for row, end in (rows.types >= 0).nonzero().tolist()[::5]:
            num_visual = int(rows.visual[row].sum())
            start = end - int(rows.positions[row, end]) + 2 + num_visual
            plain = torch.cat((embeds[row, : 2 + num_visual], embeds[row, start : end + 1]))
            alone = language_model(inputs_embeds=plain[None]).last_hidden_state
            assert torch.allclose(packed[row, end], alone[0, -1], atol=1e-3)


def test_a_killed_training_goes_on_where_it_was(monkeypatch, recipe, tmp_path):
    """Killed in step 4 and started again, the last stage ends with the weights of a run in one."""
    torch = pytest.importorskip("torch")
    import stages
    import structure
    import train

    stage = stages.Stage(5, 2, 1e-3, 1e-5, 0.5, vision_rate=0.05)
    monkeypatch.setattr(stages, "CHECKPOINT_STEPS", 2)
    take_step, num_steps = stages.STEPS["join"], 0

    def killed_in_step_4(*args):
        nonlocal num_steps
        num_steps += 1
        if num_steps == 4:
            raise KeyboardInterrupt
        return take_step(*args)

    def run(work):
        model = structure.structured_model(0)
        work.mkdir(exist_ok=True)
        stages.run_stage(model, "join", stage, train.TASK, 0, work)
        return model.state_dict()

    in_one = run(tmp_path / "one")
    monkeypatch.setitem(stages.STEPS, "join", killed_in_step_4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "two")
    in_two = run(tmp_path / "two")
    assert num_steps == 4 + 3  # steps 3 to 5 again
    assert all(torch.equal(in_one[key], in_two[key]) for key in in_one)


def test_is_exact_can_fail(questions):
    """Only the answer alone counts."""
    for question in questions[:40]:
        wrong = "red" if question.answer != "red" else "blue"
        assert shapes.is_exact(f" {question.answer}", question)
        for text in (
            "",
            wrong,
            f"{question.answer} {question.answer}",
            f"{wrong} {question.answer}",
        ):
            assert not shapes.is_exact(text, question)
