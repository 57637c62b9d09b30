"""The benchmark's own arithmetic and what it makes; engines and times are not for tests."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vllm_covipal import cli
from vllm_covipal.bench import prefill, sides
from vllm_covipal.bench.random_llava import RandomLlava, write_random_llava, write_random_ppm
from vllm_covipal.bench.requests import make_image, make_prompt, make_question
from vllm_covipal.commands.bench_tables import tables

OPTIONS = prefill.PrefillOptions(
    engine={"model": "MODEL", "dtype": "bfloat16", "kv_cache_memory_bytes": 96 << 20},
    selectors=("ppm", "grid"),
    ppm="FOLDER",
    keep_ratios=(1.0, 0.25),
    num_rounds=4,
    num_question_words=5,
    image_size=(28, 28),
    num_batches=2,
    batch_size=3,
    output_len=7,
    num_threads=1,
)
SMALL = RandomLlava(
    image_size=28,
    hidden_size=64,
    num_layers=1,
    head_size=32,
    intermediate_size=64,
    vocab_size=64,
    vision_hidden_size=32,
    vision_num_layers=2,
    vision_head_size=32,
)


class NoTemplate:
    """A processor that has none."""

    chat_template = None
    image_token = "<image>"


class FakeSide:
    """Stands for a child process: every engine step takes as long as it has prompts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tasks: list[dict[str, Any]] = []

    def measure(self, task: dict[str, Any]) -> dict[str, Any]:
        """A quarter of the time where a ratio is named."""
        self.tasks.append(task)
        share = task["keep_ratio"] or 1.0
        steps = 2.0 * share * len(task["prompts"])
        return {
            "prompt_tokens": 100,
            "kv_blocks": 4,
            "peak_running": 1,
            "preprocess_seconds": 0.5,
            "step_seconds": steps,
            "encode_seconds": 0.25,
            "select_seconds": 0.1 if share < 1 else 0.0,
            "processor_seconds": steps,
        }


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeSide]:
    """Sides without engines."""
    made: dict[str, FakeSide] = {}

    class Running:
        def __init__(self, engines: dict[str, Any], num_threads: int, stock: str) -> None:
            made.update({name: FakeSide(name) for name in engines})

        def __enter__(self) -> dict[str, FakeSide]:
            return made

        def __exit__(self, *error: object) -> None:
            return None

    monkeypatch.setattr(prefill, "running", Running)
    return made


def test_every_point_is_measured_once_a_round(fakes: dict[str, FakeSide]) -> None:
    """Rounds, batches, and one request before them; the progress says each."""
    seen: list[str] = []
    report = prefill.run_prefill(OPTIONS, NoTemplate(), seen.append)
    points = {"stock", "ppm 1", "ppm 0.25", "grid 1", "grid 0.25"}
    batched = {"stock", "ppm 1", "ppm 0.25"}
    assert _num_runs(report["request"]) == dict.fromkeys(points, 4)
    assert _num_runs(report["batch"]) == dict.fromkeys(batched, 2)
    assert Counter(seen) == {label: 5 + 2 * (label in batched) for label in points}


def _num_runs(part: dict[str, Any]) -> dict[str, int]:
    return {label: len(runs["step_seconds"]) for label, runs in part["runs"].items()}


def test_no_request_is_repeated_and_stock_names_no_ratio(fakes: dict[str, FakeSide]) -> None:
    """Every image and question is another; stock gets no option of ours."""
    prefill.run_prefill(OPTIONS, NoTemplate(), lambda label: None)
    tasks = [task for side in fakes.values() for task in side.tasks]
    images = [seed for task in tasks for seed in task["images"]]
    assert len(images) == len(set(images)) == 5 * 5 + 3 * 2 * 3
    assert {task["keep_ratio"] for task in fakes["stock"].tasks} == {None}
    assert {task["keep_ratio"] for task in fakes["grid"].tasks} == {1.0, 0.25}


def test_ratios_are_to_stock(fakes: dict[str, FakeSide]) -> None:
    """Medians over medians, within rounds, and the selector's share of stock's steps."""
    report = prefill.run_prefill(OPTIONS, NoTemplate(), lambda label: None)
    request, batch = report["request"], report["batch"]
    assert request["ratios"]["ppm 0.25"]["step_seconds"] == 0.25
    assert request["paired_ratios"]["ppm 0.25"]["step_seconds"] == 0.25
    assert request["ratios"]["stock"]["step_seconds"] == 1.0
    assert request["select_share_of_stock"]["ppm 0.25"] == pytest.approx(0.05)
    assert request["medians"]["stock"]["prefill_seconds"] == pytest.approx(1.75)
    assert batch["medians"]["stock"]["requests_per_second"] == pytest.approx(3 / 6.5)


def test_the_tables_show_every_selector_and_ratio(fakes: dict[str, FakeSide]) -> None:
    """One request, a batch, and what choosing costs."""
    report = prefill.run_prefill(OPTIONS, NoTemplate(), lambda label: None)
    settings = {"selectors": OPTIONS.selectors, "keep_ratios": OPTIONS.keep_ratios}
    settings |= {"num_rounds": 4, "num_batches": 2, "batch_size": 3, "output_len": 7}
    settings |= {"num_threads": 1, "engine": OPTIONS.engine}
    console = Console(width=200)
    with console.capture() as captured:
        for table in tables({"settings": settings, **report}):
            console.print(table)
    text = captured.get()
    assert all(part in text for part in ("stock", "ppm 0.25", "grid", "5.0%", "(0.25 x)", "96 MiB"))
    json.dumps(report)


def test_a_side_that_ends_early_shows_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that does not start is one message, with the reason."""
    monkeypatch.setattr(sides.sys, "executable", "/bin/echo")
    with (
        pytest.raises(RuntimeError, match=r"the stock side failed:\n.*vllm_covipal.bench.side"),
        sides.running({"stock": {}}, num_threads=1, stock="stock"),
    ):
        pass


def test_generated_requests_follow_their_seed() -> None:
    """The same again, and another for another seed."""
    assert make_question(3, 9) == make_question(3, 9) != make_question(4, 9)
    assert len(make_question(3, 9).split()) == 9
    image = make_image(3, 20, 10)
    assert image.size == (20, 10)
    assert image.tobytes() == make_image(3, 20, 10).tobytes() != make_image(4, 20, 10).tobytes()


def test_the_made_model_reads_the_benchmarks_prompts(tmp_path: Path) -> None:
    """One placeholder, no unknown word, and 576 visual tokens in the default size."""
    transformers = pytest.importorskip("transformers")
    write_random_llava(tmp_path, SMALL)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    prompt = make_prompt(processor, make_question(0, 28))
    ids = processor.tokenizer(prompt)["input_ids"]
    assert ids.count(processor.image_token_id) == 1
    assert processor.tokenizer.unk_token_id not in ids
    assert len(ids) == 33
    inputs = processor(text=prompt, images=make_image(0, 30, 40))
    assert sum(i == processor.image_token_id for i in inputs["input_ids"][0]) == 4
    assert RandomLlava().num_visual_tokens == 576


def test_the_made_tower_is_as_large_as_llavas() -> None:
    """About 4 % of the language model's layers; CLIP ViT-L/14 is 4.6 % of Vicuna-7B.

    Fewer, narrower heads cost more time a parameter: in time it is 7.8 %, LLaVA's 7.1.
    """
    parameters = RandomLlava().num_parameters()
    assert 0.035 < parameters["vision tower"] / parameters["language model"] < 0.05


def test_the_made_ppm_fits_the_made_model(tmp_path: Path) -> None:
    """It passes the check that a trained one passes."""
    transformers = pytest.importorskip("transformers")
    from vllm_covipal.core.fingerprint import fingerprint
    from vllm_covipal.core.pruner_files import load_pruning_module

    write_random_llava(tmp_path / "model", SMALL)
    write_random_ppm(tmp_path / "ppm", str(tmp_path / "model"))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    module = load_pruning_module(tmp_path / "ppm", fingerprint=fingerprint(config))
    assert module.config.hidden_size == 64
    with pytest.raises(ValueError, match="cannot read the configuration"):
        write_random_ppm(tmp_path / "ppm", str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep-ratios", "0"], "must be in (0, 1]"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--ppm", "FOLDER"], "--ppm needs --model"),
        (["--ppm", "FOLDER", "--selectors", "grid"], "'ppm' is not among --selectors"),
        (["--json", "no/such/folder/report.json"], "--json: no folder"),
        (["--model", "no/such/model"], "no/such/model"),
    ],
)
def test_wrong_arguments_are_said_before_anything_starts(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 2."""
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
