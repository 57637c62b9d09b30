"""The grid of an evaluation, and its files: one cell, one file, one line a sample.

A run that is killed leaves whole lines and at most one broken one; the same command goes on from
there. The samples of a cell are the same whatever else runs and however many are asked for.
"""

import fcntl
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import IO, Any

FULL = "full"
SETTINGS, LOCK = "settings.json", ".lock"
CELLS = "cells"


@dataclass(frozen=True, slots=True)
class Cell:
    """One method at one budget on one kind of sample.

    Attributes:
        method: of ``baselines.METHODS``, or the name of what a server runs.
        budget: share of the prompt's true bytes; 1 for full KV.
        protocol: of ``protocols.PROTOCOLS``.
        task: of ``tasks.FAMILIES``.
        prompt_tokens: length of the prompts.
        seed: of the samples, and of methods that draw.
    """

    method: str
    budget: float
    protocol: str
    task: str
    prompt_tokens: int
    seed: int

    @property
    def file_name(self) -> str:
        """Of the cell's lines."""
        method = re.sub(r"[^\w]", "_", self.method)
        parts = (method, f"{self.budget:g}", self.protocol, self.task, self.prompt_tokens)
        return "-".join(map(str, (*parts, self.seed))) + ".jsonl"


@dataclass(frozen=True, slots=True)
class Line:
    """What became of one sample.

    Attributes:
        index: of the sample in its cell.
        rights: one a question, [0, 1].
        depth: of the first question's needle, or None.
        true_bytes, full_bytes: of the prompt's cache; None from a server.
        said: the answers.
    """

    index: int
    rights: list[float]
    depth: float | None
    true_bytes: int | None
    full_bytes: int | None
    said: list[str]

    @property
    def right(self) -> float:
        """Mean of the questions. [0, 1]."""
        return sum(self.rights) / len(self.rights)


def grid(
    methods: Sequence[str],
    budgets: Sequence[float],
    protocols: Sequence[str],
    tasks: Sequence[str],
    lengths: Sequence[int],
    seeds: Iterable[int],
) -> list[Cell]:
    """Every combination once; full KV has no budget.

    Full KV first, as it says which tasks count; then kind by kind, so that all methods follow each
    other on the same prompts, which are read once.
    """
    # Seed by seed: a run that is cut short has whole ones.
    kinds = [kind for seed in seeds for kind in product(protocols, tasks, lengths, [seed])]
    columns = [(m, budget) for budget in budgets for m in methods if m != FULL]
    full = [Cell(FULL, 1.0, *kind) for kind in kinds if FULL in methods]
    return full + [Cell(method, budget, *kind) for kind in kinds for method, budget in columns]


def read_lines(path: Path) -> list[Line]:
    """The whole lines of a cell's file; none if there is no file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    whole = text[: text.rfind("\n") + 1]
    return [Line(**json.loads(line)) for line in whole.splitlines()]


def cut_broken_line(path: Path) -> None:
    """Leave only whole lines in the file, if there is one."""
    if path.exists():
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            with path.open("r+b") as file:
                file.truncate(end)


def append_line(path: Path, line: Line) -> None:
    """One line more, on disk before this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(line)) + "\n")


def open_folder(folder: Path, settings: dict[str, Any]) -> IO[str]:
    """Make the folder, or check that what it holds was made with the same settings.

    Returns:
        A lock on the folder, for as long as it is open.

    Raises:
        ValueError: if it was not, or another run is writing there.
    """
    (folder / CELLS).mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK).open("w", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ValueError(f"--out {folder}: another run is writing there") from None
    path = folder / SETTINGS
    if not path.exists():
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return lock
    before = json.loads(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"--out {folder} holds results with {name} {before.get(name)!r}, this command "
                f"has {value!r}; give another folder"
            )
    return lock
