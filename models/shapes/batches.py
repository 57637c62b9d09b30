"""Training batches: pictures, codes and packed questions, all drawn from a seed and a step.

Shapes: A attributes, B pictures, N visual tokens of a picture, T tokens of a row, E hidden size.

A row is one picture and many questions. A mask lets a question see the picture and itself only, and
its positions go on from the picture's, so each question is exactly the prompt that a server sees.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from structure import TOKEN_IDS, scene_codes
from torch import Tensor

from vllm_covipal.evaluation import scenes, shapes

NUM_QUESTIONS = 16  # of a row, unless a stage says otherwise
NUM_QUESTIONS_PRUNED = (1, 5)  # least, most
PRUNED_RATIO = 0.3  # of the rows: visual tokens of things that are not asked for are dropped
NUM_SEEDS = 2**40  # scenes of higher seeds are held out (shapes.make_questions)
PIXEL_MEAN, PIXEL_STD = 0.5, 0.25
PREFIX = (TOKEN_IDS[shapes.BOS], TOKEN_IDS[shapes.USER])
ASSISTANT, EOS = TOKEN_IDS[shapes.ASSISTANT], TOKEN_IDS[shapes.EOS]
IGNORED = -100


@dataclass(frozen=True)
class Rows:
    """Packed questions about B pictures.

    Attributes:
        ids: [B, T]; ``<image>`` where a visual token goes, ``<pad>`` at the end.
        visual: [B, T], bool; True at visual tokens.
        kept: [kept tokens in all, 2]: picture and cell of each visual token, in the rows' order.
        positions: [B, T].
        allowed: [B, 1, T, T], bool; True where a query (row) may see a key (column).
        targets: [B, T]; the next token where it is part of an answer, else ``IGNORED``.
        types: [B, T]; index of the question's type where a word of its answer is next, else -1.
    """

    ids: Tensor
    visual: Tensor
    kept: Tensor
    positions: Tensor
    allowed: Tensor
    targets: Tensor
    types: Tensor


def draw_scenes(
    rng: random.Random, num_pictures: int, world: scenes.World = scenes.SHAPES_WORLD
) -> list[scenes.Scene]:
    """Scenes of training seeds."""
    return [scenes.make_scene(rng.randrange(NUM_SEEDS), world) for _ in range(num_pictures)]


def codes_of(drawn: list[scenes.Scene]) -> Tensor:
    """What the visual tokens are to say, [B, N, NUM_ATTRIBUTES]."""
    return torch.from_numpy(np.stack([scene_codes(scene) for scene in drawn]))


def pixels_of(drawn: list[scenes.Scene]) -> Tensor:
    """The pictures as the image processor would give them, [B, 3, height, width]."""
    pixels = np.stack([np.asarray(scenes.draw(scene)) for scene in drawn])
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (values - PIXEL_MEAN) / PIXEL_STD


def _question_ids(question: shapes.Question) -> tuple[list[int], list[int]]:
    """Tokens of question and answer, ``</s>`` included; the answer's tokens."""
    words = question.text.removesuffix("?").split()
    answer = [TOKEN_IDS[word] for word in question.answer.split()]
    ids = [*(TOKEN_IDS[word] for word in words), TOKEN_IDS["?"], ASSISTANT, *answer, EOS]
    return ids, answer


def _kept_cells(rng: random.Random, questions: list[shapes.Question]) -> list[int]:
    """Cells of the asked things, and a random share of the others, ascending."""
    asked = {cell for question in questions for cell in question.cells}
    num_cells = questions[0].scene.world.num_cells
    others = [cell for cell in range(num_cells) if cell not in asked]
    num_others = int(len(others) * rng.random() ** 2)
    return sorted({*asked, *rng.sample(others, max(num_others, not asked))})


def make_rows(
    rng: random.Random,
    drawn: list[scenes.Scene],
    weights: dict[str, float],
    num_questions: int = NUM_QUESTIONS,
) -> Rows:
    """Questions about each scene, their types drawn with ``weights``."""
    types, shares = tuple(weights), tuple(weights.values())
    rows, kept = [], []
    for i, scene in enumerate(drawn):
        is_pruned = rng.random() < PRUNED_RATIO
        asker = shapes.Asker(scene, rng)
        count = rng.randint(*NUM_QUESTIONS_PRUNED) if is_pruned else num_questions
        questions = [asker.ask(type) for type in rng.choices(types, shares, k=count)]
        cells = range(scene.world.num_cells)
        cells = _kept_cells(rng, questions) if is_pruned else list(cells)
        kept += [(i, cell) for cell in cells]
        rows.append((len(cells), questions))
    return _pack(rows, kept)


def _pack(rows: list[tuple[int, list[shapes.Question]]], kept: list[tuple[int, int]]) -> Rows:
    columns: list[list[list[int]]] = []  # per row: ids, positions, segments, targets, types
    for num_visual, questions in rows:
        ids = [*PREFIX, *[TOKEN_IDS[shapes.IMAGE]] * num_visual]
        start = len(ids)
        positions, segments = list(range(start)), [0] * start
        targets, types = [IGNORED] * start, [-1] * start
        for segment, question in enumerate(questions, start=1):
            tokens, answer = _question_ids(question)
            size = len(tokens)
            ids += tokens
            positions += range(start, start + size)
            segments += [segment] * size
            before, type = size - len(answer) - 2, shapes.TYPES.index(question.type)
            targets += [*[IGNORED] * before, *answer, EOS, IGNORED]
            types += [*[-1] * before, *[type] * len(answer), -1, -1]
        columns.append([ids, positions, segments, targets, types])
    length = max(len(row[0]) for row in columns)
    fills = (TOKEN_IDS[shapes.PAD], 0, -1, IGNORED, -1)
    ids, positions, segments, targets, types = (
        torch.tensor([row[k] + [fill] * (length - len(row[k])) for row in columns])
        for k, fill in enumerate(fills)
    )
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    query, key = segments[:, :, None], segments[:, None, :]
    allowed = causal & ((query == key) | (key == 0))  # padding sees itself and the picture
    return Rows(
        ids=ids,
        visual=ids == TOKEN_IDS[shapes.IMAGE],
        kept=torch.tensor(kept),
        positions=positions,
        allowed=allowed[:, None],
        targets=targets,
        types=types,
    )


def noisy(rng: random.Random, codes: Tensor, basis: Tensor) -> Tensor:
    """``codes`` as visual tokens of an imperfect tower, [B, N, E].

    Args:
        basis: the visual tokens' direction of each attribute. [A, E].
    """
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    noise = torch.randn(*codes.shape[:2], basis.shape[1], generator=generator)
    scale = torch.rand(len(codes), 1, 1, generator=generator)
    return noise * (0.02 + 0.15 * scale) + codes @ basis
