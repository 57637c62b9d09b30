"""Image-text samples: a file in the LLaVA format, or generated scenes.

A sample of a file is one JSON object a line (or one element of a JSON list):

    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                         {"from": "gpt", "value": "A cat."}, ...]}

Every human turn becomes a question of its own about the picture, without the turns before it:
that is how one request meets a server. Samples without a picture are left out. A sample may have a
"type", which a recipe can weigh its questions by.
"""

import json
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, UnidentifiedImageError

from vllm_covipal.evaluation import scenes, shapes
from vllm_covipal.training.recipe import DataRecipe

PLACEHOLDER = "<image>"
NUM_SCENES = 2**40
"""Scenes of higher seeds are held out (``evaluation/shapes.py``)."""
NUM_SHAPES_QUESTIONS = 16


@dataclass(frozen=True, slots=True)
class Turn:
    """A question, ``PLACEHOLDER`` where a picture stands in it, and the answer to learn."""

    question: str
    answer: str
    type: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """Pictures and what is asked about them; ``name`` is for messages."""

    name: str
    images: tuple[Image.Image, ...]
    turns: tuple[Turn, ...]


class Source(Protocol):
    """Samples by number: the same number gives the same sample."""

    @property
    def types(self) -> Collection[str]:
        """Types of question there are."""
        ...

    def __len__(self) -> int:
        """Samples there are."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """The sample of this number, in [0, len)."""
        ...


class ShapesSource:
    """Scenes of ``evaluation/scenes.py``, all types of question alike."""

    def __init__(self, world: scenes.World = scenes.SHAPES_WORLD) -> None:
        """Args: world: what kind of picture."""
        self._world = world

    @property
    def types(self) -> Collection[str]:
        """Types of question there are."""
        return shapes.TYPES

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


class FileSource:
    """Samples of a file. Only the places of the lines stay in memory, not the lines."""

    def __init__(self, path: str, images: str) -> None:
        """Read the file through once.

        Raises:
            ValueError: if it cannot be read, or a sample is not of the format: file and line.
        """
        self._path, self._images = Path(path), Path(images)
        self.types: set[str] = set()
        self._spans: list[tuple[int, int]] = []
        self._loaded: list[Any] | None = None
        try:
            with self._path.open("rb") as file:
                if file.read(1) == b"[":
                    file.seek(0)
                    self._loaded = self._with_pictures(json.load(file))
            for number, start, line in self._lines() if self._loaded is None else ():
                if self._with_picture(self._parsed(line, number), f"line {number}"):
                    self._spans.append((start, len(line)))
        except OSError as error:
            raise ValueError(f"cannot read the samples {path} ({error.strerror})") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from None
        if not len(self):
            raise ValueError(f"{path}: no sample with an image")

    def __len__(self) -> int:
        """Samples with a picture."""
        return len(self._spans if self._loaded is None else self._loaded)

    def __getitem__(self, index: int) -> Sample:
        """The sample of that number, its pictures read.

        Raises:
            ValueError: if a picture cannot be read.
        """
        if self._loaded is None:
            start, size = self._spans[index]
            with self._path.open("rb") as file:
                file.seek(start)
                sample = json.loads(file.read(size))
        else:
            sample = self._loaded[index]
        name = str(sample.get("id", index))
        pictures = tuple(map(self._picture, _paths(sample)))
        return Sample(name, pictures, self._turns(sample, name))

    def _with_pictures(self, samples: list[Any]) -> list[Any]:
        return [s for i, s in enumerate(samples) if self._with_picture(s, f"sample {i}")]

    def _with_picture(self, sample: Any, where: str) -> bool:
        """Whether a sample counts; one that does is checked."""
        if not isinstance(sample, dict):
            raise ValueError(f"{self._path}, {where}: expected a JSON object")
        if not sample.get("image"):
            return False
        if not all(isinstance(path, str) for path in _paths(sample)):
            raise ValueError(f"{self._path}, {where}: 'image' must be a path or a list of paths")
        self._turns(sample, where)
        return True

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        start = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, start, line
                start += len(line)

    def _parsed(self, line: bytes, number: int) -> Any:
        try:
            return json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{self._path}, line {number}: not valid JSON: {error}") from None

    def _turns(self, sample: dict[str, Any], where: str) -> tuple[Turn, ...]:
        said = sample.get("conversations")
        try:
            pairs = list(zip(said[::2], said[1::2], strict=True))
            speakers = {(human["from"], answer["from"]) for human, answer in pairs}
            values = [(human["value"], answer["value"]) for human, answer in pairs]
        except (TypeError, KeyError, ValueError):
            speakers, values = set(), []
        are_texts = all(isinstance(text, str) for pair in values for text in pair)
        if speakers != {("human", "gpt")} or not are_texts:
            raise ValueError(
                f"{self._path}, {where}: 'conversations' must be human and gpt in turn, each "
                '{"from": ..., "value": ...}, the values texts'
            )
        turns = tuple(Turn(*pair, str(sample.get("type", ""))) for pair in values)
        num_pictures = len(_paths(sample))
        for turn in turns:
            if not turn.answer.strip():
                raise ValueError(f"{self._path}, {where}: an answer is blank")
            num_places = turn.question.count(PLACEHOLDER)
            if num_places > num_pictures:
                raise ValueError(
                    f"{self._path}, {where}: a question has {num_places} {PLACEHOLDER} for "
                    f"{num_pictures} picture{'s' * (num_pictures > 1)}"
                )
        self.types.add(turns[0].type)
        return turns

    def _picture(self, path: str) -> Image.Image:
        try:
            with Image.open(self._images / path) as image:
                return image.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"cannot read the image {self._images / path} ({error})") from None


def _paths(sample: dict[str, Any]) -> list[Any]:
    image = sample["image"]
    return image if isinstance(image, list) else [image]


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
