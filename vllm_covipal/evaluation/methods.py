"""Rows of the accuracy table: ways to leave visual tokens out, each by name.

Selectors that a server can run; controls that say what the figures mean (everything, nothing, the
asked part kept or dropped, another question's text, no text); and methods that look inside the
tower or the language model (``baselines/``).
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vllm_covipal import hf
from vllm_covipal.baselines import INSIDE, OUTSIDE, Unreachable
from vllm_covipal.core.pruner import PruningModule
from vllm_covipal.core.visual_item import VisualItem, with_structure
from vllm_covipal.evaluation.answers import greedy_answers
from vllm_covipal.evaluation.questions import Question
from vllm_covipal.selectors import TRAINING_FREE, Selector, build_selector

CONTROLS = ("full", "none", "asked dropped", "oracle", "ppm, other question", "ppm, no text")
WITHOUT_RATIO = ("full", "none", "asked dropped")
BLIND = "ppm trained text-blind"
METHODS = ("ppm", *TRAINING_FREE, *CONTROLS, BLIND, *OUTSIDE, *INSIDE)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, encoded, and another question about another picture."""

    question: Question
    encoded: hf.EncodedPrompt
    other_text_ids: list[int]
    image: Any = None


@dataclass(frozen=True, slots=True)
class Said:
    """Answers, and the visual tokens that a layer saw, mean of layers and questions."""

    answers: list[str]
    tokens_per_layer: float | None


@dataclass(frozen=True, slots=True)
class Evaluator:
    """What answers the questions."""

    model: Any
    processor: Any
    ppm: PruningModule | None = None
    blind_ppm: PruningModule | None = None
    max_new_tokens: int = 4
    batch_size: int = 32

    def answer(self, name: str, asked: Sequence[Asked], keep_ratio: float, seed: int = 0) -> Said:
        """Answers of one row of the table.

        Raises:
            ValueError: if the method lacks what it needs.
            Unreachable: if it cannot meet the budget.
        """
        if name in INSIDE:
            method = INSIDE[name]
            pairs = [
                method(self.model, one.encoded, keep_ratio, self.max_new_tokens) for one in asked
            ]
            answers = [self._text(ids) for ids, _ in pairs]
            return Said(answers, sum(tokens for _, tokens in pairs) / len(pairs))
        prompts = [self._prompt(name, one, keep_ratio, seed) for one in asked]
        answers = []
        for start in range(0, len(prompts), self.batch_size):
            part = prompts[start : start + self.batch_size]
            said = greedy_answers(self.model, part, max_new_tokens=self.max_new_tokens)
            answers += [self._text(ids) for ids in said]
        kept = [sum(len(rows) for rows in prompt.kept_rows) for prompt in prompts]
        return Said(answers, sum(kept) / len(kept))

    def _text(self, ids: list[int]) -> str:
        return str(self.processor.tokenizer.decode(ids, skip_special_tokens=False))

    def _prompt(self, name: str, one: Asked, keep_ratio: float, seed: int) -> hf.PrunedPrompt:
        if name in OUTSIDE:
            return OUTSIDE[name](self.model, one.encoded, keep_ratio)
        encoded = one.encoded
        if name == "ppm, other question":
            encoded = dataclasses.replace(encoded, text_ids=(one.other_text_ids,))
        if name in ("ppm, no text", BLIND):
            encoded = dataclasses.replace(encoded, text_ids=([],))
        if name in WITHOUT_RATIO:
            keep_ratio = 1.0
        selector = self._selector(name, one.question, seed)
        return hf.prune_prompt(self.model, encoded, keep_ratio=keep_ratio, selector=selector)

    def _selector(self, name: str, question: Question, seed: int) -> Selector:
        if name.startswith("ppm"):
            module = self.blind_ppm if name == BLIND else self.ppm
            if module is None:
                raise ValueError(f"method {name!r} needs a pruning module")
            return build_selector("ppm", pruning_module=module)
        if name in TRAINING_FREE:
            return build_selector(name, seed=seed)
        if name == "full":
            return Chosen(lambda item: range(item.num_candidates))
        if name == "none":
            return Chosen(lambda item: ())
        if question.cells is None or question.touched_cells is None:
            raise ValueError(f"method {name!r} needs questions that know the asked cells")
        if name == "asked dropped":
            gone = set(question.touched_cells)
            return Chosen(lambda item: [c for c in range(item.num_candidates) if c not in gone])
        if name == "oracle":
            return Chosen(lambda item: _with_others(question, item))
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")


class Chosen(Selector):
    """A given choice, of any size."""

    name: ClassVar[str] = "chosen"
    uses_text: ClassVar[bool] = False

    def __init__(self, choose: Callable[[VisualItem], Sequence[int]]) -> None:
        """Args: choose: places among an item's candidates."""
        self._places = choose

    def select(self, items: Sequence[VisualItem]) -> list[Tensor]:
        """Structure rows and the given ones."""
        return [
            with_structure(item, torch.tensor(list(self._places(item)), dtype=torch.int64))
            for item in items
        ]

    def _choose(self, items: Sequence[VisualItem]) -> list[Tensor]:
        raise NotImplementedError


def _with_others(question: Question, item: VisualItem) -> list[int]:
    """The asked cells, and others at random up to the budget. More asked cells than that stay."""
    assert question.cells is not None
    others = [c for c in range(item.num_candidates) if c not in question.cells]
    random.Random(f"oracle {question.text}").shuffle(others)
    return [*question.cells, *others][: max(item.num_kept, len(question.cells))]


def encode_questions(model: Any, processor: Any, questions: Sequence[Question]) -> list[Asked]:
    """Every question with its picture encoded; the other question is the next but one of a type.

    Raises:
        ValueError: if the family is not supported.
    """
    from vllm_covipal.training.encode import chat_prompt

    encoded = []
    for question in questions:
        prompt = chat_prompt(processor, question.text, 1)
        one = hf.encode_prompt(model, processor, prompt, images=[question.load()])
        encoded.append(
            dataclasses.replace(one, inputs={"pixel_values": one.inputs["pixel_values"]})
        )
    asked = []
    for i, question in enumerate(questions):
        others = [
            j
            for j in (*range(i + 1, len(questions)), *range(i))
            if questions[j].type == question.type and questions[j].text != question.text
        ]
        other = encoded[others[0]].text_ids[0] if others else []
        asked.append(Asked(question, encoded[i], other))
    return asked


__all__ = ["METHODS", "Asked", "Evaluator", "Said", "Unreachable", "encode_questions"]
