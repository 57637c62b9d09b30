"""All lines of an evaluation, and the figures made of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_spindle.evaluation.bootstrap import Interval, difference_interval, mean_interval
from vllm_spindle.evaluation.cells import CELLS, FULL, Cell, Line, read_lines

GATE = 0.9  # of full KV: a task that the model itself fails says nothing about a method
REFERENCE = "spindle"

Column = tuple[str, float]  # method and budget
Kind = tuple[str, int]  # task and prompt tokens


@dataclass(frozen=True, slots=True)
class Results:
    """Lines by cell; every cell has the same number, in the order of the samples."""

    lines: dict[Cell, list[Line]]

    @classmethod
    def read(cls, folder: Path, cells: Sequence[Cell], num_samples: int) -> "Results":
        """The first ``num_samples`` lines of each cell.

        Raises:
            ValueError: if a cell lacks some.
        """
        lines = {}
        for cell in cells:
            found = {line.index: line for line in read_lines(folder / CELLS / cell.file_name)}
            missing = [i for i in range(num_samples) if i not in found]
            if missing:
                raise ValueError(f"{cell.file_name} lacks {len(missing)} of {num_samples} samples")
            lines[cell] = [found[i] for i in range(num_samples)]
        return cls(lines)

    @property
    def protocols(self) -> list[str]:
        """In the order asked for."""
        return list(dict.fromkeys(cell.protocol for cell in self.lines))

    @property
    def columns(self) -> list[Column]:
        """Methods and budgets, in the order asked for."""
        return list(dict.fromkeys((cell.method, cell.budget) for cell in self.lines))

    @property
    def kinds(self) -> list[Kind]:
        """Tasks and lengths, in the order asked for."""
        return list(dict.fromkeys((cell.task, cell.prompt_tokens) for cell in self.lines))

    def of(self, protocol: str, column: Column, kind: Kind) -> list[Line]:
        """Lines of every seed."""
        cells = [
            cell
            for cell in self.lines
            if cell.protocol == protocol
            and (cell.method, cell.budget) == column
            and (cell.task, cell.prompt_tokens) == kind
        ]
        return [line for cell in sorted(cells, key=lambda c: c.seed) for line in self.lines[cell]]

    def counting(self, protocol: str) -> list[Kind]:
        """Kinds of sample that full KV gets right, if it was run; else all that were run."""
        kinds = [kind for kind in self.kinds if self.of(protocol, self.columns[0], kind)]
        if (FULL, 1.0) not in self.columns:
            return kinds
        return [k for k in kinds if _mean(self.of(protocol, (FULL, 1.0), k)) >= GATE]

    def rights(self, protocol: str, column: Column) -> list[list[float]]:
        """One list for each kind that counts: a value a sample."""
        return [
            [line.right for line in self.of(protocol, column, kind)]
            for kind in self.counting(protocol)
        ]

    def accuracy(self, protocol: str, column: Column) -> Interval | None:
        """Mean over the kinds that count; None if none does."""
        strata = self.rights(protocol, column)
        return mean_interval(strata) if strata else None

    def ahead(self, protocol: str, column: Column) -> Interval | None:
        """By how much ``REFERENCE`` at the same budget is ahead; None where there is none."""
        reference = (REFERENCE, column[1])
        if column == reference or reference not in self.columns or not self.counting(protocol):
            return None
        return difference_interval(self.rights(protocol, reference), self.rights(protocol, column))

    def true_ratio(self, protocol: str, column: Column) -> float | None:
        """True bytes over the prompt's, all samples together; None if not known."""
        lines = [line for kind in self.kinds for line in self.of(protocol, column, kind)]
        if not lines or any(not line.full_bytes for line in lines):
            return None
        return sum(line.true_bytes for line in lines) / sum(line.full_bytes for line in lines)

    def as_json(self) -> list[dict[str, Any]]:
        """A row for each protocol, method and budget; figures in percent."""
        rows = []
        for protocol in self.protocols:
            counting = self.counting(protocol)
            for column in self.columns:
                accuracy, ahead = self.accuracy(protocol, column), self.ahead(protocol, column)
                by_task = []
                for kind in self.kinds:
                    lines = self.of(protocol, column, kind)
                    if not lines:
                        continue
                    interval = mean_interval([[line.right for line in lines]])
                    by_task.append(
                        {
                            "task": kind[0],
                            "prompt_tokens": kind[1],
                            "samples": len(lines),
                            "counts": kind in counting,
                            "accuracy": interval.as_json(),
                        }
                    )
                ratio = self.true_ratio(protocol, column)
                rows.append(
                    {
                        "protocol": protocol,
                        "method": column[0],
                        "budget": column[1],
                        "true_bytes_percent": None if ratio is None else round(100 * ratio, 2),
                        "accuracy": accuracy.as_json() if accuracy else None,
                        f"{REFERENCE}_ahead_by": ahead.as_json() if ahead else None,
                        "tasks": by_task,
                    }
                )
        return rows


def _mean(lines: Sequence[Line]) -> float:
    return sum(line.right for line in lines) / len(lines)
