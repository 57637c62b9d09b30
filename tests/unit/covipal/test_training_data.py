"""Samples from files and from scenes, and the order they are drawn in."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

import tiny_lvlm
from vllm_covipal.evaluation import shapes
from vllm_covipal.training.data import ShapesSource, draw_indices, draw_turns
from vllm_covipal.training.file_source import FileSource
from vllm_covipal.training.samples import Turn

GOOD: list[dict[str, Any]] = [
    {
        "id": "a",
        "image": "one.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "This."},
            {"from": "human", "value": "And?"},
            {"from": "gpt", "value": "That."},
        ],
    },
    {"id": "text", "conversations": [{"from": "human", "value": "Hi"}]},
    {
        "image": ["one.png", "two.png"],
        "conversations": [
            {"from": "human", "value": "<image> or <image>?"},
            {"from": "gpt", "value": "Both."},
        ],
    },
]

SAID = GOOD[0]["conversations"][:2]


def _write(folder: Path, samples: list[Any], *, as_list: bool = False) -> str:
    for i, name in enumerate(("one.png", "two.png")):
        tiny_lvlm.picture(20 + i, 10).save(folder / name)
    path = folder / "samples.json"
    lines = json.dumps(samples) if as_list else "\n".join(map(json.dumps, samples)) + "\n\n"
    path.write_text(lines, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("as_list", [False, True])
def test_the_llava_format(tmp_path: Path, as_list: bool) -> None:
    """Lines or one list; text-only samples are left out; one or several pictures."""
    source = FileSource(_write(tmp_path, GOOD, as_list=as_list), str(tmp_path))
    assert len(source) == 2
    first, second = source[0], source[1]
    assert first.name == f"{tmp_path / 'samples.json'}, {'sample 0' if as_list else 'line 1'}"
    assert [image.size for image in first.images] == [(20, 10)]
    assert first.turns == (Turn("<image>\nWhat?", "This."), Turn("And?", "That."))
    assert [image.size for image in second.images] == [(20, 10), (21, 10)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conversations": []}, "line 1: 'conversations' must be"),
        ({"conversations": [{"from": "gpt", "value": "x"}] * 2}, "human and gpt in turn"),
        ({"conversations": None}, "'conversations' must be"),
        ({"conversations": SAID + SAID[::-1]}, "line 1: 'conversations' must be human and gpt in"),
        ({"conversations": [SAID[0] | {"value": None}, SAID[1]]}, "'conversations' must be"),
        ({"conversations": [SAID[0], SAID[1] | {"value": 3}]}, "'conversations' must be"),
        ({"conversations": [SAID[0], SAID[1] | {"value": " "}]}, "line 1: an answer is blank"),
        ({"image": ["one.png", 2]}, "line 1: 'image' must be a path or a list of paths"),
        (
            {"conversations": [SAID[0] | {"value": "<image> or <image>?"}, SAID[1]]},
            "line 1: a question has 2 <image> for 1 picture",
        ),
    ],
)
@pytest.mark.parametrize("as_list", [False, True])
def test_a_sample_of_another_form_is_named(
    tmp_path: Path, change: dict[str, Any], words: str, as_list: bool
) -> None:
    """At the start of the run, with its line, or its number in a list."""
    path = _write(tmp_path, [GOOD[0] | change], as_list=as_list)
    with pytest.raises(ValueError, match=words.replace("line 1", "sample 0") if as_list else words):
        FileSource(path, str(tmp_path))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    """No file, no JSON, no pictures at all, no such picture."""
    with pytest.raises(ValueError, match="cannot read the samples"):
        FileSource(str(tmp_path / "none"), ".")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"image": "a.png"\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: not valid JSON"):
        FileSource(str(broken), ".")
    for as_list in (False, True):
        with pytest.raises(ValueError, match="no sample with an image"):
            FileSource(_write(tmp_path, GOOD[1:2], as_list=as_list), ".")
        with pytest.raises(ValueError, match=r"(line 1|sample 0): expected a JSON object"):
            FileSource(_write(tmp_path, ["text"], as_list=as_list), ".")
    broken.write_bytes(b'{"image": "\xff"}\n')
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 1: not valid JSON"):
        FileSource(str(broken), ".")
    broken.write_bytes(b'[{"image": "a.png"},\n{"image')
    with pytest.raises(ValueError, match=r"broken\.jsonl: not valid JSON"):
        FileSource(str(broken), ".")


@pytest.mark.parametrize("as_list", [False, True])
def test_a_picture_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_list: bool
) -> None:
    """With file, line and reason: when it is drawn, or when pictures are looked through before."""
    samples = [*GOOD, GOOD[0] | {"image": "gone.png"}, GOOD[2] | {"image": ["one.png", "cut.png"]}]
    path = _write(tmp_path, samples, as_list=as_list)
    (tmp_path / "cut.png").write_bytes((tmp_path / "one.png").read_bytes()[:70])
    source = FileSource(path, str(tmp_path))
    lines = ["sample 3", "sample 4"] if as_list else ["line 4", "line 5"]
    for index, line, name in zip((2, 3), lines, ("gone", "cut"), strict=True):
        with pytest.raises(ValueError, match=rf"{line}: cannot read the image .*{name}\.png"):
            source[index]
    by_header = list(source.unreadable([0, 1, 2, 3, 2], whole=False))
    assert len(by_header) == 1 and f"{lines[0]}: cannot read" in by_header[0]
    assert not list(source.unreadable([0, 1], whole=True))
    whole = list(source.unreadable(range(4), whole=True))
    assert [line in said for line, said in zip(lines, whole, strict=True)] == [True, True]
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 50)
    with pytest.raises(ValueError, match=rf"{path}, .*exceeds limit"):
        source[0]


@pytest.mark.parametrize("as_list", [False, True])
def test_the_digest_is_of_the_contents(tmp_path: Path, as_list: bool) -> None:
    """The same for a copy elsewhere; another for one letter, and for an edit of no sample."""
    path = Path(_write(tmp_path, GOOD, as_list=as_list))
    digest = FileSource(str(path), str(tmp_path)).digest
    copy = tmp_path / "copy.json"
    copy.write_bytes(path.read_bytes())
    assert FileSource(str(copy), str(tmp_path)).digest == digest
    for old, new in ((b"This.", b"Thus."), (b'"text"', b'"texts"')):
        copy.write_bytes(path.read_bytes().replace(old, new))
        assert FileSource(str(copy), str(tmp_path)).digest != digest
    assert ShapesSource().digest == ""


def test_a_mark_of_byte_order_is_no_part_of_the_data(tmp_path: Path) -> None:
    """Editors on Windows write one; a list may begin after blank lines."""
    for as_list in (False, True):
        path = Path(_write(tmp_path, GOOD, as_list=as_list))
        path.write_bytes(b"\xef\xbb\xbf" + b"\n" * as_list + path.read_bytes())
        assert len(FileSource(str(path), str(tmp_path))) == 2


def test_a_file_that_changes_under_a_run_is_named(tmp_path: Path) -> None:
    """Lines are found by their place, which another file does not keep."""
    path = Path(_write(tmp_path, GOOD))
    source = FileSource(str(path), str(tmp_path))
    path.write_text("\n" * 20 + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{path}, line 1: "):
        source[0]


@pytest.mark.parametrize("num_samples", [1, 2, 5, 64, 100])
def test_every_sample_comes_once_before_any_comes_again(num_samples: int) -> None:
    """Whatever a step takes; the second round is in another order."""
    drawn = [i for step in range(num_samples) for i in draw_indices(num_samples, step, 4, seed="s")]
    rounds = [drawn[i : i + num_samples] for i in range(0, len(drawn), num_samples)]
    assert all(sorted(one) == list(range(num_samples)) for one in rounds)
    if num_samples > 5:
        assert rounds[0] != rounds[1] and rounds[0] != sorted(rounds[0])
    assert draw_indices(num_samples, 0, 4, seed="s") == drawn[:4]


def test_scenes_are_training_scenes_and_repeat() -> None:
    """Seeds below the held-out ones; the same number, the same questions and pixels."""
    source = ShapesSource()
    held_out = {question.scene.seed for question in shapes.make_questions(20, seed=1)}
    assert min(held_out) >= len(source)
    one, again = source[12345], source[12345]
    assert one.turns == again.turns and len(one.turns) == 16
    assert one.images[0].tobytes() == again.images[0].tobytes()
    assert all(0 <= i < len(source) for i in draw_indices(len(source), 7, 50, seed="s"))


def test_heavier_types_are_drawn_more_readily() -> None:
    """Each question once, none lost, in proportion for the first; without weights as ever."""
    turns = [Turn(f"{kind} {i}", "", kind) for kind in ("count", "other") for i in range(4)]
    drawn = [draw_turns(turns, 3, {"count": 4.0}, seed=seed) for seed in range(2000)]
    assert all(len(set(some)) == 3 for some in drawn)
    share = sum(some[0].type == "count" for some in drawn) / len(drawn)
    assert abs(share - 4 / 5) < 0.04
    assert set(draw_turns(turns, 8, {"count": 4.0}, seed=1)) == set(turns)
    assert draw_turns(turns, 3, {}, seed=5) == random.Random(5).sample(turns, 3)
    assert draw_turns(turns, 3, {"count": 4.0}, seed=5) == draw_turns(
        turns, 3, {"count": 4.0}, seed=5
    )


def test_types_of_a_file(tmp_path: Path) -> None:
    """A sample's type is that of all its questions; those without have an empty one."""
    source = FileSource(_write(tmp_path, [GOOD[0] | {"type": "chart"}, GOOD[2]]), str(tmp_path))
    assert source.types == {"chart", ""}
    assert {turn.type for turn in source[0].turns} == {"chart"}
