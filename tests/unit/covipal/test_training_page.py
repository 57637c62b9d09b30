"""docs/training.md is what a stranger follows: its samples are read, its commands exist."""

import json
import re
import shlex
from pathlib import Path

import tiny_lvlm
from vllm_covipal.cli import make_parser
from vllm_covipal.config import load_config
from vllm_covipal.training.data import open_source
from vllm_covipal.training.recipe import leaves, load_recipe

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_its_samples_are_samples(tmp_path: Path) -> None:
    """Each line of the example, with its type."""
    for name in ("a.jpg", "b.png"):
        tiny_lvlm.picture(20, 10).save(tmp_path / name)
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(_blocks("json")), encoding="utf-8")
    recipe = load_recipe(
        ROOT / "configs" / "covipal" / "train_lvlm.yaml",
        {"data.path": str(path), "data.images": str(tmp_path)},
    )
    source = open_source(recipe.data)
    assert len(source) == 2 and source.types == {"", "counting"}
    assert [source[i].turns[0].answer for i in range(2)] == ["A cat.", "3"]


def test_its_commands_are_commands() -> None:
    """Every flag is known, and the options of a server are valid."""
    commands = [shlex.split(line) for line in _blocks("shell")]
    assert [words[0] for words in commands].count("vllm-covipal") == 4
    for words in commands:
        if words[0] == "vllm-covipal":
            args = make_parser(words[1]).parse_args(words[1:])
            if words[1] == "train":
                dials = {k[5:]: v for k, v in vars(args).items() if k.startswith("dial:") and v}
                load_recipe(ROOT / args.config, dials)
        else:
            covipal = re.search(r'{"covipal": ({.*?})}', words[-1])
            assert covipal and load_config(json.loads(covipal[1])).keep_ratio == 0.25


def test_its_dials_are_dials() -> None:
    """Whatever it names as one of the recipe."""
    known = set(leaves())
    named = set(re.findall(r"`(?:--)?((?:stage[12]|module)\.(?!csv)[a-z0-9_]+)", PAGE))
    assert len(named) > 6 and named <= known
