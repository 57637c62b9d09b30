"""The accuracy table: answers in batches, intervals, controls on the model that sees."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_lvlm
from vllm_covipal import cli, hf
from vllm_covipal.evaluation import methods
from vllm_covipal.evaluation.accuracy import Results, Row, measure
from vllm_covipal.evaluation.answers import greedy_answers
from vllm_covipal.evaluation.bootstrap import difference_interval, mean_interval
from vllm_covipal.evaluation.questions import Question, file_questions, shapes_questions
from vllm_covipal.evaluation.table import markdown
from vllm_covipal.selectors import build_selector
from vllm_covipal.training.lvlm import load_lvlm

ROOT = Path(__file__).parents[3]
SHAPES, SHAPES_PPM = ROOT / "models" / "shapes", ROOT / "models" / "shapes-ppm"


@pytest.mark.parametrize("family", tiny_lvlm.FAMILIES)
def test_a_batch_says_what_each_prompt_alone_says(family: str) -> None:
    """Other lengths, other pictures, padding: the same tokens."""
    model, processor = tiny_lvlm.FAMILIES[family]()
    prompts = []
    for i, words in enumerate(("what ?", "is blue left of the red square ?", "circle")):
        text = f"USER : {tiny_lvlm.placeholder(family)} {words} ASSISTANT :"
        picture = tiny_lvlm.picture(48 + 16 * i, 48, seed=i)
        encoded = hf.encode_prompt(model, processor, text, images=[picture])
        selector = build_selector("divprune")
        prompts.append(hf.prune_prompt(model, encoded, keep_ratio=0.4 + i / 5, selector=selector))
    alone = [hf.generate_greedy(model, prompt, max_new_tokens=4) for prompt in prompts]
    assert greedy_answers(model, prompts, max_new_tokens=4) == alone
    assert len({tuple(ids) for ids in alone}) > 1


def test_intervals() -> None:
    """They hold the mean, shrink with more questions, and repeat."""
    few, many = mean_interval([0, 1, 1, 1] * 5), mean_interval([0, 1, 1, 1] * 100)
    assert few.mean == many.mean == 0.75
    assert few.low < many.low < 0.75 < many.high < few.high
    assert many.low > 0.65 and many.high < 0.85  # two deviations of a mean of 400: 0.043
    assert mean_interval([0, 1, 1, 1] * 5) == few
    assert mean_interval([1.0] * 9).low == 1
    same = difference_interval([0, 1, 1, 0], [0, 1, 1, 0])
    assert (same.low, same.mean, same.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_right_is_the_answer_and_nothing_else() -> None:
    """Case and final stops do not count; a longer answer is wrong."""
    question = Question(lambda: tiny_lvlm.picture(8, 8), "how many?", "3", "whole")
    assert question.is_right("3") and question.is_right(" 3. ")
    assert not question.is_right("3 4") and not question.is_right("") and not question.is_right("4")
    named = Question(question.load, "what?", "Red circle.", "t")
    assert named.is_right("red circle") and not named.is_right("circle red")


def test_the_table() -> None:
    """A row's types apart, the interval, and how far the PPM is ahead question by question."""
    load = lambda: tiny_lvlm.picture(8, 8)  # noqa: E731
    questions = [Question(load, "q", "a", type) for type in ("one", "two") * 2]
    results = Results(questions)
    results.rows += [
        Row("ppm", 0.5, (1, 1, 1, 0), 8.0),
        Row("random", 0.5, (0, 1, 0, 0.5), 8.0),
        Row("full", None, (1, 1, 1, 1), 16.0),
    ]
    lines = markdown(results).splitlines()
    assert lines[2].startswith("| ppm | 0.5 | 8 | 100.0 | 50.0 | 75.0 |")
    assert lines[3].startswith("| random | 0.5 | 8 | 0.0 | 75.0 | 37.5 |") and "+37.5" in lines[3]
    assert lines[4].startswith("| full |  | 16 | 100.0 | 100.0 | 100.0 |")
    listed = results.as_json()
    assert listed[1]["ppm_ahead_by"]["points"] == 37.5 and "ppm_ahead_by" not in listed[0]
    assert listed[0]["accuracy"]["two"] == {
        "percent": 50.0,
        "low": 0.0,
        "high": 100.0,
        "questions": 2,
    }


@cache
def _asked() -> tuple[Any, Any, list[methods.Asked]]:
    torch.set_num_threads(1)
    model, processor = load_lvlm(str(SHAPES), "float32")
    return model, processor, methods.encode_questions(model, processor, shapes_questions(48))


@cache
def _shares() -> dict[tuple[str, float | None], float]:
    from vllm_covipal.core.pruner_files import load_pruning_module

    model, processor, asked = _asked()
    evaluator = methods.Evaluator(model, processor, ppm=load_pruning_module(SHAPES_PPM))
    names = ("full", "none", "asked dropped", "oracle", "ppm", "ppm, other question", "random")
    results = measure(evaluator, asked, names, (0.05,), num_seeds=2)
    return {(row.method, row.keep_ratio): sum(row.rights) / len(row.rights) for row in results.rows}


def test_controls_on_the_model_that_sees() -> None:
    """All tokens or the asked ones answer; without the asked ones it guesses."""
    shares = _shares()
    assert shares["full", None] > 0.9
    assert shares["oracle", 0.05] > shares["full", None] - 0.1
    assert shares["asked dropped", None] < 0.5 and shares["none", None] < 0.5


def test_the_shipped_module_chooses_what_is_asked_for() -> None:
    """At one token in twenty: far above random, and lost with another question's words."""
    shares = _shares()
    assert shares["ppm", 0.05] > shares["random", 0.05] + 0.3
    assert shares["ppm", 0.05] > shares["ppm, other question", 0.05] + 0.2


def test_an_unknown_or_unfit_row_is_named() -> None:
    """Before anything runs, or with what it lacks."""
    model, processor, asked = _asked()
    evaluator = methods.Evaluator(model, processor)
    with pytest.raises(ValueError, match="'ppm' needs a pruning module"):
        evaluator.answer("ppm", asked[:1], 0.5)
    with pytest.raises(ValueError, match="method must be one of"):
        evaluator.answer("best", asked[:1], 0.5)


def test_questions_of_a_file_carry_their_type(tmp_path: Path) -> None:
    """The LLaVA format, a type beside it; pictures are read when asked for."""
    tiny_lvlm.picture(30, 20).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    sample = {"id": "x", "image": "a.png", "type": "animals", "conversations": turns * 2}
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(sample) + "\n", encoding="utf-8")
    questions = file_questions(str(path), str(tmp_path))
    assert [(q.text, q.answer, q.type) for q in questions] == [("What?", "A cat.", "animals")] * 2
    assert questions[0].load().size == (30, 20) and questions[0].cells is None
    # Ids are the data's affair: missing, used twice, or like another sample's number.
    others = [sample | {"type": "plants"}, sample | {"id": "0", "type": "tools"}, sample]
    del others[0]["id"]
    path.write_text("\n".join(map(json.dumps, [sample, *others])), encoding="utf-8")
    types = [question.type for question in file_questions(str(path), str(tmp_path))]
    assert types == ["animals"] * 2 + ["plants"] * 2 + ["tools"] * 2 + ["animals"] * 2
    path.write_text(json.dumps(sample | {"image": ["a.png", "a.png"]}), encoding="utf-8")
    with pytest.raises(ValueError, match="no sample with just one image"):
        file_questions(str(path), str(tmp_path))


def test_rows_of_another_file_are_refused(tmp_path: Path, capsys: Any) -> None:
    """As many questions, and others."""
    tiny_lvlm.picture(30, 20).save(tmp_path / "a.png")

    def asked(words: str) -> list[str]:
        turns = [{"from": "human", "value": words}, {"from": "gpt", "value": "A cat."}]
        data = tmp_path / f"{words}.jsonl"
        data.write_text(json.dumps({"image": "a.png", "conversations": turns}), encoding="utf-8")
        run = ["eval", "--model", str(SHAPES), "--methods", "grid", "--keep-ratio", "0.5"]
        return [*run, "--data", str(data), "--images", str(tmp_path)]

    report = str(tmp_path / "one.json")
    assert cli.main([*asked("one"), "--json", report]) == 0
    assert cli.main([*asked("one"), "--rows-from", report]) == 0
    assert cli.main([*asked("two"), "--rows-from", report]) == 2
    assert "of another file of questions" in capsys.readouterr().err


def test_answers_that_cannot_be_said_are_refused(tmp_path: Path, capsys: Any) -> None:
    """More tokens than a method may say would make all of them wrong alike; before any of it."""
    tiny_lvlm.picture(30, 20).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red blue red blue red"}]
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"image": "a.png", "conversations": turns}), encoding="utf-8")
    run = ["eval", "--model", str(SHAPES), "--methods", "grid", "--keep-ratio", "0.5"]
    run += ["--data", str(data), "--images", str(tmp_path)]
    assert cli.main(run) == 2
    said = capsys.readouterr().err
    assert "--max-new-tokens 4: the answer 'red blue red blue red' has 5 tokens" in said
    assert cli.main([*run, "--max-new-tokens", "6"]) == 0


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    """Table on the terminal and in files; names with commas are names."""
    out = tmp_path / "rows.json"
    arguments = ["eval", "--model", str(SHAPES), "--ppm", str(SHAPES_PPM), "--num-questions", "8"]
    arguments += ["--methods", "full,ppm, other question,grid", "--keep-ratio", "0.1"]
    assert cli.main([*arguments, "--json", str(out)]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in rows] == ["full", "ppm, other question", "grid"]
    assert rows[0]["accuracy"]["all"]["questions"] == 8 and len(rows[0]["rights"]) == 8
    assert "| grid | 0.1 | 15 |" in capsys.readouterr().out
    pictures = ["--pictures", str(tmp_path), "--num-pictures", "2"]
    again = ["eval", "--model", str(SHAPES), "--ppm", str(SHAPES_PPM), "--methods", "ppm"]
    again += ["--keep-ratio", "0.1", "--rows-from", str(out), "--num-questions"]
    assert cli.main([*again, "8", "--json", str(tmp_path / "all.json"), *pictures]) == 0
    # Everything, and beside it what the module keeps; of the first two questions.
    sheets = [Image.open(path) for path in sorted(tmp_path.glob("*.png"))]
    assert len(sheets) == 2
    for sheet in sheets:
        brightness = np.asarray(sheet.convert("L"), dtype=float)[48:, :]
        left, right = np.array_split(brightness, 2, axis=1)
        assert left.mean() > 1.3 * right.mean()
    document = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in document["rows"]] == [
        "full",
        "ppm, other question",
        "grid",
        "ppm",
    ]
    assert document["rows"][2]["rights"] == rows[2]["rights"]
    assert "ppm_ahead_by" in document["rows"][2] and "ppm_ahead_by" not in rows[2]
    assert document["provenance"]["rows_from"][0]["num_questions"] == 8
    assert cli.main([*again, "4"]) == 2
    assert "8 questions of seed 3000017, here 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either --model or --endpoint"),
        (["--model", "m", "--endpoint", "http://x"], "either --model or --endpoint"),
        (["--model", "m", "--keep-ratio", "0"], "--keep-ratio must be in"),
        (["--endpoint", "http://x", "--pictures", "."], "--pictures needs --model"),
        (["--model", "m", "--pictures", "no/such"], "--pictures: no folder no/such"),
        (["--model", "m", "--json", "no/such/a.json"], "--json: no folder no/such"),
        (["--model", "m", "--markdown", "no/such/a.md"], "--markdown: no folder no/such"),
        (["--model", "m", "--plot", "no/such/a.png"], "--plot: no folder no/such"),
        (["--model", "m", "--num-questions", "0"], "--num-questions must be at least 1, got 0"),
        (["--model", "m", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--model", str(SHAPES), "--methods", "full,best"], "'best' is none of: ppm"),
    ],
)
def test_what_is_wrong_is_said_first(arguments: list[str], words: str, capsys: Any) -> None:
    """One line, exit code 2."""
    assert cli.main(["eval", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_no_server_is_one_line(capsys: Any) -> None:
    """Exit code 1: something that should have answered did not."""
    url = "http://127.0.0.1:9/v1"
    assert cli.main(["eval", "--endpoint", url, "--num-questions", "1"]) == 1
    assert f"no server answers at {url}/models" in capsys.readouterr().err
