"""The command line: what it refuses, in one line, and the figures of `plan`. No engine, no vLLM."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_spindle import cli
from vllm_spindle.commands import demo, doctor, doctor_install
from vllm_spindle.engine import compat

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 256,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
}
LAYER_TOKEN_BYTES = 2 * 2 * 32 * 2  # key and value, kv heads, head size, bytes

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor sets this where it is not set; other tests' engines must not inherit it."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., str]:
    """Write a model folder of nothing but a config.json."""

    def write(**overrides: object) -> str:
        text = json.dumps(LLAMA | overrides)
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        return str(tmp_path)

    return write


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: exit code, output, errors."""

    def call(*argv: str) -> tuple[int, str, str]:
        try:
            code = cli.main(argv)
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def assert_refused(result: tuple[int, str, str], *parts: str) -> None:
    """Exit code 2 and one line on stderr that holds every part."""
    code, _, errors = result
    assert code == 2
    assert errors.count("\n") == 1
    assert [part for part in parts if part not in errors] == []


def test_help_imports_nothing_heavy() -> None:
    """`vllm-spindle --help` lists every command without loading any of them."""
    program = (
        "import sys\n"
        "from vllm_spindle.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'vllm', 'transformers', 'pydantic', 'rich', 'yaml', 'httpx', 'numpy'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout
    assert {name for name, _, _ in cli.COMMANDS} <= set(done.stdout.split())


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["COMMAND"]),
        (["plam"], ["plam", "plan", "doctor", "demo", "bench"]),
        (["plan"], ["MODEL", "--prompt-len"]),
        (["plan", "M", "--prompt-len", "many"], ["--prompt-len", "many"]),
        (["plan", "M", "--prompt-len", "9", "--keepratio", "1"], ["--keepratio"]),
        (["plan", "M", "--prompt-len", "0"], ["--prompt-len=0", "at least 1"]),
        (["plan", "M", "--prompt-len", "9", "--block-size", "0"], ["--block-size=0"]),
        (["plan", "M", "--prompt-len", "9", "--keep-ratio", "2"], ["keep_ratio=2", "1"]),
        (["plan", "M", "--prompt-len", "9", "--window", "w"], ["window='w'", "integer"]),
        (["plan", "M", "--prompt-len", "9", "--config", "no.yaml"], ["no.yaml", "No such file"]),
        (["plan", "./no-such-model", "--prompt-len", "9"], ["MODEL=./no-such-model", "folder"]),
        (["demo", "--keep-ratio", "1.0"], ["--keep-ratio=1.0", "below 1"]),
        (["demo", "--questions", "0"], ["--questions=0", "at least 1"]),
        (["demo", "--prompt-len", "64"], ["prompt_tokens=64", ">= "]),
        (["demo", "--keep-ratio", "x"], ["keep_ratio='x'", "number"]),
    ],
    ids=str,
)
def test_a_users_error_is_one_line(run: Run, argv: list[str], parts: list[str]) -> None:
    """Exit code 2, one line that names the option and its value, no traceback."""
    assert_refused(run(*argv), *parts)


def test_a_model_that_cannot_be_planned_is_refused(
    run: Run, model: Callable[..., str], tmp_path: Path
) -> None:
    """Too long a prompt, too many bands, no config.json: each names what to change."""
    folder = model()
    plan = ("plan", folder, "--keep-ratio", "0.5", "--prompt-len")
    assert_refused(run(*plan, "5000"), "--prompt-len=5000", "4096")
    assert_refused(run(*plan, "100", "--num-bands", "7"), "num_bands=7", "6 layers")
    assert_refused(run(*plan, "100", "--num-bands", "4"), "num_bands=4", "1, 2, 3, 6")
    assert_refused(run(*plan, "100", "--dtype", "fp8"), "--dtype=fp8", "bfloat16")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert_refused(run(*plan, "100"), "MODEL=", "not valid JSON")
    (tmp_path / "config.json").unlink()
    assert_refused(run(*plan, "100"), "MODEL=", "no config.json")


def test_plan_by_hand(run: Run, model: Callable[..., str]) -> None:
    """6 layers, a quarter of 1,024 tokens: 24 of 96 blocks, 8 a band or 12 + 8 + 4; bytes."""
    argv = ["plan", model(), "--keep-ratio", "0.25", "--prompt-len", "1024", "--json"]
    uniform = json.loads(run(*argv)[1])
    assert [band["held_blocks"] for band in uniform["bands"]] == [8, 8, 8]
    code, out, _ = run(*argv, "--budget", "pyramid")
    report = json.loads(out)
    assert code == 0
    assert [band["held_blocks"] for band in report["bands"]] == [12, 8, 4]
    assert [band["freed_blocks"] for band in report["bands"]] == [20, 24, 28]
    assert [band["region_tokens"] for band in report["bands"]] == [352, 224, 96]
    assert [band["recent_tokens"] for band in report["bands"]] == [32, 32, 32]
    assert [band["last_layer"] for band in report["bands"]] == [1, 3, 5]
    assert report["full_bytes"] == 1024 * 6 * LAYER_TOKEN_BYTES == report["prompt_bytes"]
    assert report["held_bytes"] == report["allocated_bytes"] == 24 * 32 * 2 * LAYER_TOKEN_BYTES
    assert report["true_ratio"] == 0.25
    assert report["notes"] == []


def test_plan_shows_what_a_protected_prefix_costs(run: Run, model: Callable[..., str]) -> None:
    """1,500 tokens, 1,000 protected: 31 whole blocks in every band, a quarter of the 508 others."""
    argv = ["plan", model(), "--keep-ratio", "0.25", "--prompt-len", "1500", "--json"]
    report = json.loads(run(*argv, "--protected-prefix-tokens", "1000")[1])
    assert [band["protected_tokens"] for band in report["bands"]] == [992] * 3
    # 0.25 * 508 tokens * 6 layers in blocks of 2 layers x 32 tokens: 11, 1 each recent in it.
    assert sum(band["held_blocks"] - 31 for band in report["bands"]) == 11
    assert sum(band["freed_blocks"] for band in report["bands"]) == 3 * 16 - 11
    assert report["held_bytes"] == (3 * 31 + 11) * 32 * 2 * LAYER_TOKEN_BYTES
    assert any("992 tokens of protected prefix" in note for note in report["notes"])
    whole = json.loads(run(*argv, "--protected-prefix-tokens", "1400")[1])
    assert not whole["is_reduced"]
    assert any("kept whole" in note for note in whole["notes"])
    auto = json.loads(run(*argv, "--protected-prefix-tokens", "auto")[1])
    assert any("not known before the traffic" in note for note in auto["notes"])


@pytest.mark.parametrize("prompt_len", [600, 1024, 1500, 4001])
@pytest.mark.parametrize("num_layers", [6, 13])
def test_plan_never_holds_more_than_asked(
    run: Run, model: Callable[..., str], num_layers: int, prompt_len: int
) -> None:
    """Bytes that vLLM allocates, padding of blocks and bands included, stay within keep_ratio."""
    folder = model(num_hidden_layers=num_layers)
    argv = ["plan", folder, "--keep-ratio", "0.3", "--prompt-len", str(prompt_len), "--json"]
    report = json.loads(run(*argv)[1])
    held = [band["held_blocks"] for band in report["bands"]]
    sizes = [band["last_layer"] - band["first_layer"] + 1 for band in report["bands"]]
    assert sum(sizes) == num_layers
    allocated = sum(held) * max(sizes) * 32 * LAYER_TOKEN_BYTES
    assert report["allocated_bytes"] == allocated
    assert allocated <= 0.3 * prompt_len * num_layers * LAYER_TOKEN_BYTES
    assert report["held_bytes"] == 32 * LAYER_TOKEN_BYTES * sum(
        blocks * size for blocks, size in zip(held, sizes, strict=True)
    )
    assert any("pads" in note for note in report["notes"]) == (num_layers == 13)


def test_plan_of_codebooks_by_hand(run: Run, model: Callable[..., str]) -> None:
    """30 % of 1,024 tokens: 14, 8 and 3 blocks; in the first 896 rows a head, 186 of them codes.

    992 tokens take 31 rows of 32 elements for each array of 16 bits, and 62 for the positions.
    """
    methods = ["--band-methods", "[merge, both, evict]", "--key-share", "0.25"]
    methods += ["--budget", "pyramid"]
    argv = ["plan", model(), "--keep-ratio", "0.3", "--prompt-len", "1024", *methods]
    bands = json.loads(run(*argv, "--json")[1])["bands"]
    first, second, third = (band["codebook"] for band in bands)
    assert [band["held_blocks"] for band in bands] == [15, 9, 4]
    assert (first["method"], first["merged_tokens"], bands[0]["region_tokens"]) == (
        "merge",
        992,
        992,
    )
    assert first["key_entries"] == (896 - 186) // 4
    assert first["key_entries"] + first["value_entries"] == 710
    assert first["entry_bytes"] == 2 * 2 * 710 * 32 * 2  # layers, heads
    # Two 16-bit indexes, two norms and a position of two elements for each of 992 tokens.
    for part in ("index_bytes", "norm_bytes", "position_bytes"):
        assert first[part] == 2 * 2 * 992 * 4
    assert first["padding_bytes"] == 0
    assert first["true_ratio"] == 14 / 31
    assert first["paper_ratio"] == pytest.approx(710 / (2 * 992) * (1 + 2 / 32))
    assert (second["method"], second["merged_tokens"]) == ("both", 2 * 8 * 32)
    assert third is None
    for band, book in zip(bands[:2], (first, second), strict=True):
        region = (band["held_blocks"] - 1) * 32 * 2 * LAYER_TOKEN_BYTES
        parts = ("entry", "index", "norm", "position", "padding")
        assert sum(book[f"{part}_bytes"] for part in parts) == region
        assert book["true_ratio"] > book["paper_ratio"]
    text = run(*argv)[1]
    assert all(part in text for part in ("Codebooks", "merged", "both", "177 + 533", "paper's"))


def test_plan_without_codebooks_shows_none(run: Run, model: Callable[..., str]) -> None:
    """Evicted, or kept whole: no second table."""
    argv = ["plan", model(), "--prompt-len", "1024"]
    assert "Codebooks" not in run(*argv, "--keep-ratio", "0.5")[1]
    assert "Codebooks" not in run(*argv, "--keep-ratio", "1.0", "--method", "merge")[1]


def test_plan_of_unfold_counts_each_copy_once(run: Run, model: Callable[..., str]) -> None:
    """Copies of the region for each query head cost blocks, and keep no more tokens."""
    argv = ["plan", model(), "--keep-ratio", "0.5", "--prompt-len", "2048", "--gqa", "unfold"]
    for band in json.loads(run(*argv, "--json")[1])["bands"]:
        assert band["region_tokens"] * 4 == (band["held_blocks"] - 1) * 32


def test_plan_reads_a_file_and_a_flag_wins(
    run: Run, model: Callable[..., str], tmp_path: Path
) -> None:
    """--config fills the dials; a flag beside it overrides its own alone."""
    (tmp_path / "half.yaml").write_text("keep_ratio: 0.5\nwindow: 64\n", encoding="utf-8")
    argv = ["plan", model(), "--prompt-len", "1024", "--json", "--config"]
    argv += [str(tmp_path / "half.yaml"), "--keep-ratio", "0.3"]
    config = json.loads(run(*argv)[1])["config"]
    assert (config["keep_ratio"], config["window"]) == (0.3, 64)


@pytest.mark.parametrize(
    ("options", "note"),
    [
        (["--prompt-len", "1024"], "keep_ratio is 1.0"),
        (["--prompt-len", "100", "--keep-ratio", "0.5"], "min_prompt_len=128"),
        (["--prompt-len", "300", "--keep-ratio", "0.02"], "recent tokens alone"),
        (["--prompt-len", "130", "--keep-ratio", "0.5", "--recent", "100"], "the first block"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_plan_says_why_it_is_not_what_was_asked(
    run: Run, model: Callable[..., str], options: list[str], note: str
) -> None:
    """Off, too short, or nothing but recent tokens: a note says which."""
    report = json.loads(run("plan", model(), *options, "--json")[1])
    assert [text for text in report["notes"] if note in text]


def test_plan_prints_a_table(run: Run, model: Callable[..., str]) -> None:
    """Without --json: a row per band, the total, and the true ratio beside the asked one."""
    code, out, _ = run("plan", model(), "--keep-ratio", "0.25", "--prompt-len", "1500")
    assert code == 0
    assert all(text in out for text in ("0-1", "2-3", "4-5", "320 + 28", "2,256", "0.249"))


def test_float32_weights_are_planned_as_vllm_serves_them(
    run: Run, model: Callable[..., str]
) -> None:
    """Without a --dtype, float32 weights mean a bfloat16 cache, as in vLLM; with one, that."""
    argv = ["plan", model(dtype="float32"), "--prompt-len", "1024", "--json"]
    assert json.loads(run(*argv)[1])["full_bytes"] == 1024 * 6 * LAYER_TOKEN_BYTES
    assert json.loads(run(*argv, "--dtype", "float32")[1])["full_bytes"] == (
        1024 * 6 * LAYER_TOKEN_BYTES * 2
    )


def test_a_failed_child_is_told_without_a_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RuntimeError: its message and exit code 1; its subclasses are bugs and pass."""
    monkeypatch.setattr(demo, "run", _raise(RuntimeError("the stock server ended")))
    code, _, errors = run("demo")
    assert (code, errors) == (1, "vllm-spindle demo: the stock server ended\n")
    monkeypatch.setattr(demo, "run", _raise(NotImplementedError("a bug")))
    with pytest.raises(NotImplementedError):
        run("demo")


def _raise(error: Exception) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def test_demo_gives_both_servers_the_same_flags() -> None:
    """Only --additional-config tells the plugin's flags from stock's."""
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    args = parser.parse_args(["--keep-ratio", "0.25"])
    stock = demo.serve_flags(args, None)
    plugin = demo.serve_flags(args, demo.read_dials(args))
    assert plugin == [*stock, "--additional-config", '{"spindle": {"keep_ratio": 0.25}}']


def test_doctor_takes_the_flags_of_vllm_serve() -> None:
    """Everything behind MODEL is vLLM's, known to us or not."""
    args = cli.make_parser("doctor").parse_args(["doctor", "M", "--kv-cache-dtype", "fp8", "-x"])
    assert (args.model, args.flags) == ("M", ["--kv-cache-dtype", "fp8", "-x"])


@pytest.mark.parametrize("found", ["0.31.2", "0.33.0", "dev", None])
def test_doctor_stops_at_another_vllm(
    run: Run, monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    """Another vLLM, or none: exit code 1, and the versions that fit."""
    monkeypatch.setattr(compat, "installed_vllm", lambda: found)
    code, out, _ = run("doctor")
    assert code == 1
    assert ">=0.32,<0.33" in out.replace("\n", "")
    assert "1 of 1 checks" in out


def test_doctor_finds_a_plugin_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM_PLUGINS without spindle, or no entry point at all, each with its way out."""

    def ways_out() -> list[str]:
        return [check.way_out for check in doctor_install._plugins()]

    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert ways_out() == ["VLLM_PLUGINS=other,spindle, or unset it"]
    monkeypatch.setattr(doctor_install, "entry_points", lambda group: [])
    assert all("pip install" in text for text in ways_out())


def test_doctor_exit_code_follows_the_checks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 if every check is fine, 1 if one is not."""
    fine, bad = doctor.Check("vLLM", "fits"), doctor.Check("platform", "a toaster", "use a CPU")
    monkeypatch.setattr(doctor_install, "install_checks", lambda: [fine])
    assert run("doctor")[0] == 0
    monkeypatch.setattr(doctor_install, "install_checks", lambda: [fine, bad])
    code, out, _ = run("doctor")
    assert code == 1
    assert "toaster" in out
    assert "use a CPU" in out
