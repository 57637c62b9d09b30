"""Training as users start it: a process killed by the system, two processes, less memory."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tiny_lvlm
from vllm_covipal.training.checkpoint import FOLDER

RECIPE = Path(__file__).parents[3] / "configs" / "covipal" / "train_shapes.yaml"
STEPS = 12
MANY_STEPS = 80  # so that who kills may be late
DEADLINE = 300  # seconds; a step takes a fraction of one
# One thread: sums in the same order, run after run.
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "ACCELERATE_USE_CPU": "true",
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a run over eight pictures on a tiny model; no ``--out``."""
    folder = tmp_path_factory.mktemp("training")
    model = tiny_lvlm.write("llava", folder / "model")
    dials = {
        "config": RECIPE,
        "model": model,
        "data.kind": "jsonl",
        "data.path": tiny_lvlm.write_samples(folder, 8),
        "data.images": folder,
        "checkpoint_steps": 4,
        "num_threads": 1,
        "stage1.num_steps": STEPS,
        "stage1.guide_layer": 1,
        "stage1.pictures": 4,
        "stage2.num_steps": STEPS,
        "stage2.pictures": 4,
        "stage2.keep_ratio": "[0.25, 0.5]",
        "stage2.type_weights": "{}",  # the samples have no types
    }
    return ["train", *(word for name, value in dials.items() for word in (f"--{name}", str(value)))]


def _start(arguments: list[str], out: Path, *launcher: str) -> subprocess.Popen[str]:
    module = ["-m", *launcher, "-m"] if launcher else ["-m"]
    command = [sys.executable, *module, "vllm_covipal.cli", *arguments, "--out", str(out)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True)


def _finish(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, said


def _curves(out: Path) -> list[list[dict[str, str]]]:
    found = []
    for stage in (1, 2):
        with (out / f"stage{stage}.csv").open(newline="", encoding="utf-8") as file:
            found.append(list(csv.DictReader(file)))
    return found


def test_a_run_killed_by_the_system_goes_on(arguments: list[str], tmp_path: Path) -> None:
    """SIGKILL in stage 2, at whatever step that is: the same curves and weights in the end."""
    arguments = [*arguments, "--stage2.num_steps", str(MANY_STEPS)]
    _finish(_start(arguments, tmp_path / "whole"))
    out = tmp_path / "killed"
    process = _start(arguments, out)
    started = time.monotonic()
    while not any((out / FOLDER).glob("stage2-*")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() - started < DEADLINE
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "provenance.json").exists(), "it had ended before it was killed"
    _finish(_start(arguments, out))
    made_by = json.loads((out / "provenance.json").read_text(encoding="utf-8"))
    assert made_by["seconds"]["goes_on_from"]["stage"] == 2
    assert _curves(out) == _curves(tmp_path / "whole")
    name = "model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_two_processes_are_one_with_twice_the_pictures(
    arguments: list[str], tmp_path: Path
) -> None:
    """accelerate's data parallelism: the same samples, shared out, give the same stage 1."""
    one, two = tmp_path / "one", tmp_path / "two"
    shorter = [*arguments, "--stage1.num_steps", "4", "--stage2.num_steps", "1"]
    _finish(_start(shorter, one))
    halved = [*shorter, "--stage1.pictures", "2", "--stage2.pictures", "2"]
    # What ``accelerate launch`` starts; its own ``--cpu`` would want MPI for two.
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    _finish(_start(halved, two, *launcher))
    made_by = json.loads((two / "provenance.json").read_text(encoding="utf-8"))
    assert made_by["num_processes"] == 2
    losses = [[float(row["loss"]) for row in _curves(out)[0]] for out in (one, two)]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize(
    ("dial", "tolerance"), [("gradient_checkpointing", 1e-5), ("mixed_precision", 0.05)]
)
def test_less_memory_is_the_same_training(
    arguments: list[str], tmp_path: Path, dial: str, tolerance: float
) -> None:
    """Layers computed again, exactly; in bfloat16, nearly."""
    shorter = [*arguments, "--stage1.num_steps", "2", "--stage2.num_steps", "3"]
    value = {"gradient_checkpointing": "true", "mixed_precision": "bf16"}[dial]
    _finish(_start(shorter, tmp_path / "plain"))
    _finish(_start([*shorter, f"--{dial}", value], tmp_path / "less"))
    losses: list[Any] = [
        [float(row["loss"]) for stage in _curves(tmp_path / name) for row in stage]
        for name in ("plain", "less")
    ]
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    if dial == "mixed_precision":
        assert losses[1] != losses[0], "nothing was rounded"
