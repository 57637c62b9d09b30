"""``vllm-spindle eval``: refusals, going on after a kill, and figures of known answers."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vllm_spindle import cli
from vllm_spindle.evaluation import bootstrap
from vllm_spindle.evaluation.asking import Reply
from vllm_spindle.evaluation.bootstrap import difference_interval, mean_interval
from vllm_spindle.evaluation.cells import (
    CELLS,
    FULL,
    Cell,
    Line,
    append_line,
    grid,
    open_folder,
    read_lines,
)
from vllm_spindle.evaluation.results import Results
from vllm_spindle.evaluation.runner import run_cell
from vllm_spindle.evaluation.table import markdown
from vllm_spindle.evaluation.tasks.item import Sample
from vllm_spindle.evaluation.tasks.words import NeedleWords

ROOT = Path(__file__).parents[3]
NEEDLE = str(ROOT / "models" / "needle")
CELL = Cell("snapkv", 0.25, "question_last", "multikey_1", 300, 0)

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command in this process, results in ``tmp_path``: exit code, output, errors."""

    def call(*argv: str) -> tuple[int, str, str]:
        try:
            code = cli.main(["eval", *argv, "--out", str(tmp_path)])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--model"),
        (["--model", NEEDLE, "--budgets", "0.5,x"], "'x'"),
        (["--model", NEEDLE, "--budgets", "0.5,1.5"], "(0, 1)"),
        (["--model", NEEDLE, "--lengths", "12"], "--lengths"),
        (["--model", NEEDLE, "--num-questions", "0"], "--num-questions"),
        (["--model", NEEDLE, "--methods", "full,snapkb"], "'snapkb'"),
        (["--model", NEEDLE, "--tasks", "single,lookup"], "'lookup'"),
        (["--model", NEEDLE, "--protocols", "last"], "'last'"),
        (["--model", NEEDLE, "--tasks", "variables"], "cannot be said"),
        (["--model", NEEDLE, "--dtype", "float7"], "float7"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--endpoint", "http://localhost:1", "--methods", "snapkv"], "--methods"),
        (["--endpoint", "http://localhost:1", "--protocols", "in_turn"], "in_turn"),
        (["--model", NEEDLE, "--nonsense"], "--nonsense"),
    ],
)
def test_refusals_are_one_line(run: Run, argv: list[str], said: str) -> None:
    """What the user can mend is one line that names it, and exit code 2."""
    code, _, errors = run(*argv)
    assert code == 2
    assert said in errors
    assert errors.count("\n") == 1


def test_no_server_is_one_line(run: Run) -> None:
    """An endpoint that does not answer is exit code 1 and one line."""
    code, _, errors = run("--endpoint", "http://127.0.0.1:9")
    assert (code, errors.count("\n")) == (1, 1)
    assert "no server answers" in errors


def test_missing_matplotlib_is_said_before_anything_runs(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--plots`` without matplotlib is refused, with what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, errors = run("--model", NEEDLE, "--plots")
    assert code == 2
    assert "pip install" in errors


class Echo:
    """Answers by a rule, and counts."""

    def __init__(self, rule: Callable[[Sample], list[str]], die_at: int | None = None) -> None:
        self.dialect = NeedleWords()
        self.num_asked = 0
        self._rule, self._die_at = rule, die_at

    def ask(self, cell: Cell, sample: Sample) -> Reply:
        if self.num_asked == self._die_at:
            raise KeyboardInterrupt
        self.num_asked += 1
        return Reply(self._rule(sample), 10, 40)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, "tests")
from unit.spindle.test_eval_command import CELL, Echo
from vllm_spindle.evaluation.cells import open_folder
from vllm_spindle.evaluation.runner import run_cell

class Dying(Echo):
    def ask(self, cell, sample):
        if self.num_asked == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().ask(cell, sample)

folder = Path(sys.argv[1])
open_folder(folder, {})
run_cell(Dying(lambda sample: list(sample.answers)), CELL, folder, 9)
"""


def test_goes_on_after_a_kill(tmp_path: Path) -> None:
    """Killed in a sample, then in the middle of a line, it asks for the rest; no line differs."""
    child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, check=False)
    assert child.returncode == -signal.SIGKILL
    path = tmp_path / CELLS / CELL.file_name
    assert len(read_lines(path)) == 4
    with path.open("a", encoding="utf-8") as file:
        file.write('{"index": 4, "rights": [1.')
    going_on = Echo(lambda sample: list(sample.answers))
    run_cell(going_on, CELL, tmp_path, 9)
    assert going_on.num_asked == 5
    whole = tmp_path / "whole"
    open_folder(whole, {})
    run_cell(Echo(lambda sample: list(sample.answers)), CELL, whole, 9)
    assert path.read_text() == (whole / CELLS / CELL.file_name).read_text()


def test_more_questions_go_on_too(tmp_path: Path) -> None:
    """The first samples are the same however many are asked for."""
    open_folder(tmp_path, {})
    for num_samples, num_new in ((3, 3), (3, 0), (5, 2)):
        asker = Echo(lambda sample: ["wrong"] * len(sample.answers))
        run_cell(asker, CELL, tmp_path, num_samples)
        assert asker.num_asked == num_new
    lines = read_lines(tmp_path / CELLS / CELL.file_name)
    assert [line.index for line in lines] == [0, 1, 2, 3, 4]
    assert {line.right for line in lines} == {0.0}


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    """Results of two models never mix."""
    for _ in range(2):
        open_folder(tmp_path, {"model": "a", "dtype": "auto"}).close()
    with pytest.raises(ValueError, match="model 'a'.*'b'"):
        open_folder(tmp_path, {"model": "b", "dtype": "auto"})


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    """The second is refused while the first runs, and let in after it."""
    with open_folder(tmp_path, {}), pytest.raises(ValueError, match="another run"):
        open_folder(tmp_path, {})
    open_folder(tmp_path, {}).close()


ORPHANED = """
import os, signal, sys, time
from functools import partial
from pathlib import Path
sys.path.insert(0, "tests")
from unit.spindle.test_eval_command import CELL, Echo
from vllm_spindle.evaluation.cells import open_folder
from vllm_spindle.evaluation.runner import run_cells_in_workers

def said(sample):
    return list(sample.answers)

class Slow(Echo):
    def ask(self, cell, sample):
        (folder / "worker").write_text(str(os.getpid()))
        time.sleep(0.05)
        return super().ask(cell, sample)

folder = Path(sys.argv[1])
if __name__ == "__main__":
    open_folder(folder, {})
    import threading
    def die():
        while not (folder / "worker").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=die).start()
    make = partial(Slow, said)
    run_cells_in_workers(make, [CELL], folder, 10**6, num_workers=1, on_samples=print)
"""


def test_workers_end_with_a_killed_run(tmp_path: Path) -> None:
    """No worker goes on writing after the process that the user killed."""
    program = tmp_path / "program.py"
    program.write_text(ORPHANED)
    child = subprocess.run([sys.executable, str(program), str(tmp_path)], cwd=ROOT, check=False)
    assert child.returncode == -signal.SIGKILL
    worker = int((tmp_path / "worker").read_text())
    for _ in range(300):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        os.kill(worker, signal.SIGKILL)
        pytest.fail("the worker is still there")


def test_cells_have_files_of_their_own() -> None:
    """No two cells of a grid share a file; full KV comes once, whatever the budgets."""
    lengths, seeds = [256, 512], range(2)
    cells = grid(["full", "a b", "spindle"], [0.5, 0.25], ["p", "q"], ["s"], lengths, seeds)
    assert len({cell.file_name for cell in cells}) == len(cells) == 8 * (1 + 2 * 2)
    assert {cell.budget for cell in cells if cell.method == FULL} == {1.0}


def _results(tmp_path: Path, rights: dict[tuple[str, float], dict[str, list[float]]]) -> Results:
    """Lines on disk from a known table, read again."""
    open_folder(tmp_path, {})
    cells = []
    for (method, budget), tasks in rights.items():
        for task, values in tasks.items():
            cell = Cell(method, budget, "question_last", task, 512, 0)
            cells.append(cell)
            for i, right in enumerate(values):
                kept = int(1000 * budget)
                line = Line(i, [right], None, kept, 1000, ["said"])
                append_line(tmp_path / CELLS / cell.file_name, line)
    return Results.read(tmp_path, cells, 4)


KNOWN = {
    (FULL, 1.0): {"easy": [1, 1, 1, 1], "hard": [1, 0, 0, 0]},
    ("spindle", 0.25): {"easy": [1, 1, 1, 0], "hard": [0, 0, 0, 0]},
    ("random", 0.25): {"easy": [1, 0, 0, 0], "hard": [1, 1, 1, 1]},
}


def test_figures_of_known_answers(tmp_path: Path) -> None:
    """Only what full KV passes counts; leads are paired; bytes are those of the lines."""
    results = _results(tmp_path, KNOWN)
    assert results.counting("question_last") == [("easy", 512)]
    rows = {(row["method"], row["budget"]): row for row in results.as_json()}
    assert rows["full", 1.0]["accuracy"] == {"percent": 100.0, "low": 100.0, "high": 100.0}
    assert rows["spindle", 0.25]["accuracy"]["percent"] == 75.0
    assert rows["random", 0.25]["accuracy"]["percent"] == 25.0
    assert rows["random", 0.25]["spindle_ahead_by"]["percent"] == 50.0
    assert rows["spindle", 0.25]["spindle_ahead_by"] is None
    assert rows["random", 0.25]["true_bytes_percent"] == 25.0
    tasks = {task["task"]: task for task in rows["random", 0.25]["tasks"]}
    assert [tasks[name]["counts"] for name in ("easy", "hard")] == [True, False]
    assert tasks["hard"]["accuracy"]["percent"] == 100.0


def test_the_table_says_the_same(tmp_path: Path) -> None:
    """Accuracy, lead and true bytes stand in their columns, and what was left out is named."""
    text = markdown(_results(tmp_path, KNOWN))
    assert "Left out, full KV below 90 %: hard (512 tokens)." in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    first = next(row for row in rows if row and row[0] == "spindle")
    assert first[1].startswith("75.0 (")
    assert first[2] == "25.0"
    lead = [row for row in rows if row and row[0] == "random"][1]
    assert lead[1].startswith("+50.0 (")
    assert ["random", "25 %", "25.0", "100.0"] in rows


def test_missing_lines_are_said(tmp_path: Path) -> None:
    """A cell that lacks samples is no result."""
    _results(tmp_path, KNOWN)
    with pytest.raises(ValueError, match="lacks 1 of 5"):
        Results.read(tmp_path, [Cell(FULL, 1.0, "question_last", "easy", 512, 0)], 5)


def _loop_interval(strata: list[list[float]], num_draws: int) -> tuple[float, float]:
    """The same draws, one value at a time."""
    rng = np.random.default_rng(0)
    means = [0.0] * num_draws
    for values in strata:
        for draw, indices in enumerate(rng.integers(len(values), size=(num_draws, len(values)))):
            total = 0.0
            for i in indices:
                total += values[i]
            means[draw] += total / len(values) / len(strata)
    means.sort()
    return means[int(0.025 * num_draws)], means[-1 - int(0.025 * num_draws)]


def test_intervals_equal_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each task drawn again by itself, each weighing the same, whatever its samples."""
    monkeypatch.setattr(bootstrap, "NUM_DRAWS", 400)
    strata = [[1.0, 0.0, 0.0, 1.0, 1.0], [0.25, 0.5, 1.0], [0.0] * 7 + [1.0]]
    interval = mean_interval(strata)
    assert interval.mean == pytest.approx((0.6 + 1.75 / 3 + 0.125) / 3)
    assert (interval.low, interval.high) == pytest.approx(_loop_interval(strata, 400))
    with pytest.raises(ValueError, match="no values"):
        mean_interval([[1.0], []])


def test_differences_are_paired() -> None:
    """Two methods wrong on the same samples differ by nothing, with no width."""
    rights = [[1.0, 0.0, 1.0, 0.0, 0.0, 1.0]]
    gap = difference_interval(rights, rights)
    assert (gap.mean, gap.low, gap.high) == (0, 0, 0)
    wide = mean_interval(rights)
    assert wide.high - wide.low > 0.3


def test_the_whole_command_on_the_bundled_model(run: Run, tmp_path: Path) -> None:
    """Full KV answers, random eviction within its bytes; the second run asks nothing again."""
    argv = ["--model", NEEDLE, "--methods", "full,random,spindle_uniform", "--budgets", "0.5"]
    argv += ["--tasks", "single", "--lengths", "160", "--num-questions", "3"]
    code, out, _ = run(*argv)
    assert code == 0
    assert out == (tmp_path / "table.md").read_text()
    document = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["protocol"], row["method"]): row for row in document["rows"]}
    for protocol in ("question_last", "after_compression"):
        assert rows[protocol, "full"]["accuracy"]["percent"] == 100
        assert 40 < rows[protocol, "random"]["true_bytes_percent"] <= 50
        assert 40 < rows[protocol, "spindle_uniform"]["true_bytes_percent"] <= 50  # an ablation
    assert document["provenance"]["versions"]["torch"]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / CELLS).iterdir()}
    assert run(*argv)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / CELLS).iterdir()} == files
