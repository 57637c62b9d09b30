"""Crowd: fuller pictures, and codes that words and visual tokens do not share."""

import sys
from pathlib import Path

import numpy as np
import pytest

from vllm_covipal.evaluation import scenes, shapes
from vllm_covipal.evaluation.scenes import CROWD_WORLD

MODELS = Path(__file__).parents[3] / "models"
CROWD, CROWD_PPM = MODELS / "crowd", MODELS / "crowd-ppm"


@pytest.fixture
def recipe(monkeypatch):
    """Both recipes' folders on the path, without the modules of other recipes' names."""
    pytest.importorskip("transformers")
    folders = [MODELS / "shapes", CROWD]
    names = {file.stem for folder in folders for file in folder.glob("*.py")}
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    for folder in folders:
        monkeypatch.syspath_prepend(str(folder))
    yield
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.fixture(scope="module")
def questions():
    return shapes.make_questions(200, seed=3, world=CROWD_WORLD)


@pytest.mark.parametrize("seed", range(8))
def test_a_picture_is_full(seed):
    """16 to 24 things and 4 to 8 distractors, no two marks alike, each in its own cell."""
    scene = scenes.make_scene(seed, CROWD_WORLD)
    everything = (*scene.things, *scene.distractors)
    assert 16 <= len(scene.things) <= 24
    assert 4 <= len(scene.distractors) <= 8
    assert len({thing.cell for thing in everything}) == len(everything)
    assert max(thing.cell for thing in everything) < CROWD_WORLD.num_cells == 256
    marks = [thing.letter for thing in everything if thing.letter]
    assert len(set(marks)) == len(marks)
    assert all(len(mark) == 2 for mark in marks)
    assert scenes.draw(scene).size == (192, 192)


@pytest.mark.parametrize("seed", range(4))
def test_a_mark_lies_in_its_cell(seed):
    """Without its mark, a picture changes in the thing's own cell and nowhere else."""
    from dataclasses import replace

    scene = scenes.make_scene(seed, CROWD_WORLD)
    thing = scene.things[0]
    bare = (replace(thing, letter=None), *scene.things[1:])
    before, after = (
        np.asarray(scenes.draw(one)).astype(int) for one in (scene, replace(scene, things=bare))
    )
    ys, xs = np.nonzero(np.abs(before - after).sum(-1))
    assert set(ys // 12 * 16 + xs // 12) == {thing.cell}


def test_names_are_of_one_thing(questions):
    """A place that names a thing has no other thing in it; a distractor's words are never said."""
    for question in questions:
        assert not {scenes.DULL_COLOR, scenes.DULL_SHAPE} & set(question.text.split())
        if question.kind == "letters" and " at column " in question.text:
            column, row = question.text.removesuffix("?").split()[-3], question.text[-2]
            here = [
                thing
                for thing in question.scene.things
                if "abcdefgh"[thing.column // 2] == column and thing.row // 2 + 1 == int(row)
            ]
            assert [" ".join(thing.letter) for thing in here] == [question.answer]
    assert {len(q.answer.split()) for q in questions if q.type == "marks"} == {2}


def test_the_translation_starts_where_shapes_ends(recipe):
    """First weights answer models/shapes' questions from visual tokens in the new directions."""
    pytest.importorskip("torch")
    import random
    from dataclasses import replace

    import stages
    import train

    assert Path(train.__file__).parent == CROWD
    task = replace(train.TASK, world=scenes.SHAPES_WORLD)
    stage = replace(train.STAGES["ask"], num_pictures=4)
    _, shares = stages.ask_step(train.first_weights(0), stage, random.Random(0), task)
    assert min(shares["single"], shares["marks"]) > 0.9
    untranslated = replace(task, basis=task.basis.roll(1, dims=0))
    _, shares = stages.ask_step(train.first_weights(0), stage, random.Random(0), untranslated)
    assert max(shares["single"], shares["marks"]) < 0.5


def test_first_words_and_visual_tokens_share_no_direction(recipe):
    """Before training, the cosine of any word with any visual token is zero."""
    import train

    words = train.first_weights(0).get_input_embeddings().weight.detach()
    assert float((words @ train.TASK.basis.T).abs().max()) == 0


@pytest.fixture(scope="module")
def shares():
    """Right answers of the shipped weights to 60 questions, by method, at one token in twenty."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from vllm_covipal.core.pruner_files import load_pruning_module
    from vllm_covipal.evaluation import methods
    from vllm_covipal.evaluation.accuracy import measure
    from vllm_covipal.evaluation.questions import shapes_questions
    from vllm_covipal.training.lvlm import load_lvlm

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, processor = load_lvlm(str(CROWD), "float32")
    asked = methods.encode_questions(model, processor, shapes_questions(60, world=CROWD_WORLD))
    evaluator = methods.Evaluator(model, processor, ppm=load_pruning_module(CROWD_PPM))
    names = (
        "full",
        "asked dropped",
        "oracle",
        "ppm",
        "ppm, other question",
        "divprune",
        "cdpruner",
    )
    rows = measure(evaluator, asked, names, (0.05,)).rows
    torch.set_num_threads(threads)
    return {row.method: sum(row.rights) / len(row.rights) for row in rows}


def test_the_shipped_model_sees(shares):
    """It answers with all tokens, or with the asked things' among few, and guesses without."""
    assert shares["full"] > 0.9
    assert shares["oracle"] > 0.88
    assert shares["asked dropped"] < 0.5


def test_the_shipped_module_is_ahead(shares):
    """At one token in twenty it finds what is asked for, and what needs no training does not."""
    assert shares["ppm"] > 0.85
    for name in ("ppm, other question", "divprune", "cdpruner"):
        assert shares["ppm"] > shares[name] + 0.15


def test_words_point_nowhere_near_visual_tokens():
    """In the shipped weights no cosine of a question's word with a thing's token stands out."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    largest = {}
    for folder, world in (("shapes", scenes.SHAPES_WORLD), ("crowd", CROWD_WORLD)):
        load = transformers.LlavaForConditionalGeneration.from_pretrained
        model = load(MODELS / folder, dtype=torch.float32).eval()
        processor = transformers.AutoProcessor.from_pretrained(MODELS / folder)
        scene = scenes.make_scene(2**40, world)
        inputs = processor(images=scenes.draw(scene), text=shapes.PROMPT, return_tensors="pt")
        with torch.inference_mode():
            tokens = model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        words = model.get_input_embeddings().weight.detach()[
            [shapes.VOCAB.index(c) for c in scenes.COLORS]
        ]
        unit = torch.nn.functional.normalize
        things = tokens[[thing.cell for thing in scene.things]]
        largest[folder] = float((unit(words, dim=-1) @ unit(things, dim=-1).T).abs().max())
    assert largest["crowd"] < 0.05 < 0.2 < largest["shapes"]
