"""Curves as CSV: one row a logged step, one file a stage."""

import csv
from pathlib import Path


class Curve:
    """Rows appended to a file; those of steps that are to be taken again are cut off."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Args: path: the file. first_step: rows of it and later ones go."""
        self._path = path
        self._fields: list[str] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            # A row that a full disk cut short has no values at its end.
            kept = [r for r in rows if None not in r.values() and int(r["step"]) < first_step]
            self._fields = list(rows[0]) if rows else []
            partial = path.with_suffix(".partial")
            with partial.open("w", newline="", encoding="utf-8") as file:
                if kept:
                    writer = csv.DictWriter(file, self._fields)
                    writer.writeheader()
                    writer.writerows(kept)
                else:
                    self._fields = []
            partial.replace(path)

    def append(self, step: int, values: dict[str, float]) -> None:
        """One row, on disk when this returns."""
        row = {"step": step} | {name: f"{value:.6g}" for name, value in values.items()}
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._fields or list(row))
            if not self._fields:
                writer.writeheader()
                self._fields = list(row)
            writer.writerow(row)
