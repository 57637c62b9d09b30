"""Questions to measure with: generated scenes, or a file in the LLaVA format.

A file's samples may carry ``"type"``; accuracy is reported for each type apart.
"""

import hashlib
import json
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from vllm_covipal.evaluation import scenes, shapes

SEED = 3_000_017
"""Of held-out questions; another than the seeds that the models' own recipes look at."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one picture.

    Attributes:
        load: reads or draws the picture.
        text: without placeholder and template.
        answer: what counts as right, compared word by word.
        type: reported apart.
        cells: visual tokens that hold what is asked for; None where that is not known.
        touched_cells: all that see any of it; likewise.
    """

    load: Callable[[], Image.Image]
    text: str
    answer: str
    type: str
    cells: tuple[int, ...] | None = None
    touched_cells: tuple[int, ...] | None = None

    def is_right(self, said: str) -> bool:
        """Whether ``said`` is the answer and nothing else; case and final stops do not count."""
        return _words(said) == _words(self.answer)


def shapes_questions(
    num_questions: int, *, seed: int = SEED, world: scenes.World = scenes.SHAPES_WORLD
) -> list[Question]:
    """Held-out questions about generated scenes, the types in turn."""
    return [
        Question(
            load=lambda scene=q.scene: scenes.draw(scene),  # type: ignore[misc]
            text=q.text,
            answer=q.answer,
            type=q.type,
            cells=q.cells,
            touched_cells=q.touched_cells,
        )
        for q in shapes.make_questions(num_questions, seed=seed, world=world)
    ]


def file_questions(path: str, images: str, num_questions: int | None = None) -> list[Question]:
    """The first ``num_questions`` of a file; pictures are read when they are needed.

    Raises:
        ValueError: as ``training.file_source.FileSource``, or if no sample has one picture.
    """
    from vllm_covipal.training.file_source import FileSource
    from vllm_covipal.training.samples import PLACEHOLDER

    source = FileSource(path, images)
    questions: list[Question] = []
    for index in range(len(source)):
        sample = source[index]
        if len(sample.images) != 1:
            continue
        for turn in sample.turns:
            questions.append(
                Question(
                    load=lambda i=index: source[i].images[0],  # type: ignore[misc]
                    text=turn.question.replace(PLACEHOLDER, "").strip(),
                    answer=turn.answer,
                    type=turn.type or "all",
                )
            )
        if num_questions and len(questions) >= num_questions:
            return questions[:num_questions]
    if not questions:
        raise ValueError(f"{path}: no sample with just one image")
    return questions


def digest(questions: Sequence[Question]) -> str:
    """Sixteen hex digits of what is asked and what is right, for questions that have no seed."""
    words = json.dumps([(question.text, question.answer) for question in questions])
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def _words(text: str) -> list[str]:
    return [word.strip(string.punctuation).lower() or word for word in text.split()]
