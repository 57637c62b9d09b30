"""Where samples come from, generated scenes or a file, and the order they are drawn in."""

import random
from collections.abc import Mapping, Sequence

from vllm_covipal.evaluation import scenes, shapes
from vllm_covipal.training.file_source import FileSource
from vllm_covipal.training.recipe import DataRecipe, TrainRecipe
from vllm_covipal.training.samples import PLACEHOLDER, Sample, Source, Turn

NUM_SCENES = 2**40
"""Scenes of higher seeds are held out (``evaluation/shapes.py``)."""
NUM_SHAPES_QUESTIONS = 16


class ShapesSource(Source):
    """Scenes of ``evaluation/scenes.py``, all types of question alike."""

    types = shapes.TYPES

    def __init__(self, world: scenes.World = scenes.SHAPES_WORLD) -> None:
        """Args: world: what kind of picture."""
        self._world = world

    def __len__(self) -> int:
        """More than any run takes."""
        return NUM_SCENES

    def __getitem__(self, index: int) -> Sample:
        """The scene of that seed."""
        scene = scenes.make_scene(index, self._world)
        asker = shapes.Asker(scene, random.Random(f"train {index}"))
        types = [shapes.TYPES[i % len(shapes.TYPES)] for i in range(NUM_SHAPES_QUESTIONS)]
        questions = [asker.ask(kind) for kind in types]
        turns = tuple(Turn(f"{PLACEHOLDER}\n{q.text}", q.answer, q.type) for q in questions)
        return Sample(f"scene {index}", (scenes.draw(scene),), turns)


def open_source(recipe: DataRecipe) -> Source:
    """The recipe's samples."""
    if recipe.kind in scenes.WORLDS:
        return ShapesSource(scenes.WORLDS[recipe.kind])
    assert recipe.path is not None
    return FileSource(recipe.path, recipe.images)


def draw_turns(
    turns: Sequence[Turn], num_drawn: int, weights: Mapping[str, float], *, seed: int
) -> list[Turn]:
    """Some of a sample's questions, each at most once, those of heavier types more readily.

    Args:
        turns: to draw from.
        num_drawn: at most as many as there are.
        weights: type -> weight, 1 where not named.
        seed: of the draw.
    """
    rng = random.Random(seed)
    if not weights:
        return rng.sample(turns, num_drawn)
    # Efraimidis and Spirakis, 2006: the highest of u ** (1 / w), u uniform.
    keys = [rng.random() ** (1 / weights.get(turn.type, 1.0)) for turn in turns]
    order = sorted(range(len(turns)), key=keys.__getitem__, reverse=True)
    return [turns[i] for i in order[:num_drawn]]


def drawn_samples(
    recipe: TrainRecipe,
    stage: int,
    step: int,
    num_samples: int,
    *,
    process_index: int,
    num_processes: int,
) -> list[int]:
    """Samples of a step that one process takes."""
    pictures = (recipe.stage1 if stage == 1 else recipe.stage2).pictures
    seed = f"{recipe.seed} {stage} samples"
    indices = draw_indices(num_samples, step, pictures * num_processes, seed=seed)
    return indices[process_index::num_processes]


def draw_indices(num_samples: int, step: int, num_drawn: int, *, seed: str) -> list[int]:
    """Samples of a step: all once, in an order of the seed's, then all again in another.

    Depends on its arguments alone, so that a resumed run draws what the killed one would have.
    """
    if num_samples >= NUM_SCENES:
        rng = random.Random(f"{seed} {step}")
        return [rng.randrange(num_samples) for _ in range(num_drawn)]
    drawn = []
    for place in range(step * num_drawn, (step + 1) * num_drawn):
        epoch, i = divmod(place, num_samples)
        drawn.append(_permuted(i, num_samples, f"{seed} {epoch}"))
    return drawn


def _permuted(i: int, num_samples: int, seed: str) -> int:
    """Image of ``i`` under a permutation of [0, num_samples) drawn from the seed."""
    # A Feistel network over the next power of four, walked until it lands inside: no list needed.
    half = max(1, (max(1, num_samples - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    rng = random.Random(seed)
    keys = [rng.getrandbits(64) for _ in range(4)]
    while True:
        left, right = i >> half, i & mask
        for key in keys:
            mixed = (right * 0x9E3779B97F4A7C15 + key) & ((1 << 64) - 1)
            mixed ^= mixed >> 29
            mixed = (mixed * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
            left, right = right, left ^ ((mixed >> 32) & mask)
        i = (left << half) | right
        if i < num_samples:
            return i
