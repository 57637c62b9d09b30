"""Checkpoints: folders that are whole or not there.

    OUT/checkpoints/stage1-000100/
        config.json, model.safetensors    the module, as serving loads it
        optimizer.pt                      the optimizer's state
        scaler.pt                         the gradient scaler's, with fp16
        state.json                        stage, steps done, digests of recipe and data
        provenance.json                   what made it

Everything that a step draws comes from the seed, the stage, the step and the process, so no state
of a generator is needed beside these.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vllm_covipal.core.pruner import PruningModule
from vllm_covipal.core.pruner_files import WEIGHTS_NAME, save_pruning_module
from vllm_covipal.training.recipe import TrainRecipe

FOLDER = "checkpoints"
NUM_KEPT = 2


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        stage: 1 or 2.
        step: steps done of that stage.
        digest: of the recipe up to this stage, without what changes no number.
        num_processes: each draws samples of its own.
        data_digest: of the samples' file; empty where there is none, and in older checkpoints.
    """

    stage: int
    step: int
    digest: str
    num_processes: int
    data_digest: str = ""

    @property
    def name(self) -> str:
        """Folder name; sorts by time."""
        return f"stage{self.stage}-{self.step:06d}"


def recipe_digest(recipe: TrainRecipe, stage: int) -> str:
    """Sixteen hex digits of all that changes the numbers up to that stage's end.

    So another stage 2 may follow a stage 1 that is done.
    """
    left_out = {"out", "checkpoint_steps", "log_steps"} | ({"stage2"} if stage == 1 else set())
    values = recipe.model_dump(mode="json", exclude=left_out)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def save_checkpoint(
    out: Path,
    progress: Progress,
    module: PruningModule,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    provenance: dict[str, Any],
) -> None:
    """Write a checkpoint, then drop the oldest. A kill leaves the earlier ones.

    Raises:
        RuntimeError: if the disk does not take it.
    """
    folder = out / FOLDER
    partial, final = folder / "partial", folder / progress.name
    shutil.rmtree(partial, ignore_errors=True)
    with writing(final):
        save_pruning_module(module, partial)
        torch.save(optimizer.state_dict(), partial / "optimizer.pt")
        if scaler is not None:
            torch.save(scaler.state_dict(), partial / "scaler.pt")
        write_json(partial / "state.json", asdict(progress))
        write_json(partial / "provenance.json", provenance)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in _folders(out)[:-NUM_KEPT]:
            shutil.rmtree(old)


def last_progress(
    out: Path, recipe: TrainRecipe, num_processes: int, data_digest: str
) -> Progress | None:
    """Where the run in this folder is; None if it has no checkpoint.

    Raises:
        ValueError: if the checkpoint is of another recipe, other data or another number of
            processes, or cannot be read.
    """
    folders = _folders(out)
    if not folders:
        return None
    with _whole(folders[-1]):
        state = json.loads((folders[-1] / "state.json").read_text(encoding="utf-8"))
        progress = Progress(**state)
    if progress.digest != recipe_digest(recipe, progress.stage):
        raise ValueError(f"{folders[-1]} is of another recipe: give another out, or --restart")
    if progress.data_digest not in ("", data_digest):
        raise ValueError(
            f"{folders[-1]} is of other data: {recipe.data.path} has changed since; put the "
            "former file back, give another out, or --restart"
        )
    if progress.num_processes != num_processes:
        raise ValueError(
            f"{folders[-1]} is of a run of {progress.num_processes} processes, this one has "
            f"{num_processes}: each draws its own samples, so give the same number or --restart"
        )
    return progress


def load_module(out: Path, progress: Progress, module: PruningModule) -> None:
    """Weights of the checkpoint into ``module``.

    Raises:
        ValueError: if they cannot be read.
    """
    folder = out / FOLDER / progress.name
    with _whole(folder):
        module.load_state_dict(load_file(folder / WEIGHTS_NAME))


def load_optimizer(
    out: Path,
    progress: Progress,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """State of the checkpoint's optimizer, and of its gradient scaler where there is one.

    Raises:
        ValueError: if it cannot be read.
    """
    folder = out / FOLDER / progress.name
    with _whole(folder):
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state)
        if scaler is not None and (folder / "scaler.pt").exists():  # earlier runs wrote none
            scaler.load_state_dict(torch.load(folder / "scaler.pt", weights_only=True))


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """What a disk raises, as one line.

    Raises:
        RuntimeError: naming what could not be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's of a full disk: Runtime
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RuntimeError(
            f"cannot write {what} ({reason}); the checkpoint before it is whole: the same command "
            "goes on from there"
        ) from error


@contextmanager
def _whole(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of torch's, safetensors' or json's, as the file is broken
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{folder} is no whole checkpoint ({reason}): remove it, or --restart"
        ) from None


def write_json(path: Path, values: Any) -> None:
    """Indented, one line end at the end."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _folders(out: Path) -> list[Path]:
    return sorted((out / FOLDER).glob("stage?-*"))
