"""The accuracy table: methods x keep ratios x question types, with intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_covipal.evaluation.bootstrap import difference_interval, mean_interval
from vllm_covipal.evaluation.methods import (
    WITHOUT_RATIO,
    Asked,
    Evaluator,
    Said,
    Unreachable,
)
from vllm_covipal.evaluation.questions import Question

ALL = "all"
REFERENCE = "ppm"


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one ratio.

    Attributes:
        method: of ``methods.METHODS``, or the name of a served endpoint.
        keep_ratio: None where there is none.
        rights: 1 or 0 a question, or the mean over seeds. In the order of the questions.
        tokens_per_layer: visual tokens that a layer saw, mean of layers and questions.
    """

    method: str
    keep_ratio: float | None
    rights: tuple[float, ...]
    tokens_per_layer: float | None


@dataclass(slots=True)
class Results:
    """All rows over the same questions."""

    questions: Sequence[Question]
    rows: list[Row] = field(default_factory=list)

    def types(self) -> list[str]:
        """Question types in the order of their first question, then all of them."""
        types = list(dict.fromkeys(question.type for question in self.questions))
        return [*types, ALL] if len(types) > 1 else types

    def of_type(self, row: Row, type: str) -> list[float]:
        """The row's figures for questions of a type."""
        pairs = zip(row.rights, self.questions, strict=True)
        return [right for right, question in pairs if type in (question.type, ALL)]

    def reference(self, row: Row) -> Row | None:
        """The PPM's row at the same ratio."""
        for other in self.rows:
            if other.method == REFERENCE and other.keep_ratio == row.keep_ratio:
                return other
        return None

    def as_json(self) -> list[dict[str, Any]]:
        """A list of rows: figures in percent, and right or wrong question by question."""
        listed = []
        for row in self.rows:
            accuracy = {}
            for type in self.types():
                interval = mean_interval(self.of_type(row, type))
                accuracy[type] = {
                    "percent": round(100 * interval.mean, 2),
                    "low": round(100 * interval.low, 2),
                    "high": round(100 * interval.high, 2),
                    "questions": len(self.of_type(row, type)),
                }
            entry: dict[str, Any] = {
                "method": row.method,
                "keep_ratio": row.keep_ratio,
                "visual_tokens_per_layer": row.tokens_per_layer,
                "accuracy": accuracy,
            }
            reference = self.reference(row)
            if reference is not None and reference is not row:
                gap = difference_interval(reference.rights, row.rights)
                entry["ppm_ahead_by"] = {
                    "points": round(100 * gap.mean, 2),
                    "low": round(100 * gap.low, 2),
                    "high": round(100 * gap.high, 2),
                }
            entry["rights"] = [int(r) if r in (0, 1) else round(r, 3) for r in row.rights]
            listed.append(entry)
        return listed


Report = Callable[[Row], None]


def measure(
    evaluator: Evaluator,
    asked: Sequence[Asked],
    methods: Sequence[str],
    keep_ratios: Sequence[float],
    *,
    num_seeds: int = 5,
    report: Report | None = None,
) -> Results:
    """Answer every question by every method at every ratio.

    Args:
        evaluator: the model.
        asked: encoded questions.
        methods: of ``methods.METHODS``.
        keep_ratios: for methods that have one.
        num_seeds: of ``random``, averaged.
        report: called after each row.
    """
    results = Results([one.question for one in asked])
    for method in methods:
        for keep_ratio in (None,) if method in WITHOUT_RATIO else keep_ratios:
            seeds = range(num_seeds) if method == "random" else range(1)
            try:
                said = [evaluator.answer(method, asked, keep_ratio or 1.0, s) for s in seeds]
            except Unreachable:
                continue
            results.rows.append(row_of(method, keep_ratio, results.questions, said))
            if report:
                report(results.rows[-1])
    return results


def row_of(
    method: str, keep_ratio: float | None, questions: Sequence[Question], said: Sequence[Said]
) -> Row:
    """Right or wrong, question by question, mean over what was said at each seed."""
    rights = tuple(
        sum(q.is_right(one.answers[i]) for one in said) / len(said) for i, q in enumerate(questions)
    )
    tokens = [one.tokens_per_layer for one in said if one.tokens_per_layer is not None]
    return Row(method, keep_ratio, rights, sum(tokens) / len(tokens) if tokens else None)
