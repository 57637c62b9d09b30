"""Samples of a file in the LLaVA format.

One JSON object a line (or one element of a JSON list) is a sample:

    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                         {"from": "gpt", "value": "A cat."}, ...]}

Every human turn becomes a question of its own about the picture, without the turns before it:
that is how one request meets a server. Samples without a picture are left out. A sample may have a
"type", which a recipe can weigh its questions by.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_covipal.pictures import check_header, read_picture
from vllm_covipal.training.samples import PLACEHOLDER, Sample, Source, Turn

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NUM_CHECKED_AT_ONCE = 1024


class FileSource(Source):
    """Samples of a file. Only the places of the lines stay in memory, not the lines."""

    def __init__(self, path: str, images: str) -> None:
        """Read the file through once.

        Raises:
            ValueError: if it cannot be read, or a sample is not of the format: file and line.
        """
        self._path, self._images = Path(path), Path(images)
        self.types: set[str] = set()
        self._places: list[tuple[int, int, int]] = []  # number, start and length of a line
        self._loaded: list[tuple[int, Any]] | None = None  # number and sample, of a list
        # Of every byte: beside parsing it costs a few percent of this one pass, and unlike times
        # and sizes it survives a copy to another machine and sees any edit.
        digest = hashlib.sha256()
        try:
            with self._path.open("rb") as file:
                if file.read(64).removeprefix(BYTE_ORDER_MARK).lstrip()[:1] == b"[":
                    file.seek(0)
                    self._load(file.read(), digest)
                else:
                    file.seek(0)
                    self._find_lines(file, digest)
        except OSError as error:
            raise ValueError(f"cannot read the samples {path} ({error.strerror})") from None
        self.digest = digest.hexdigest()[:16]
        if not len(self):
            raise ValueError(f"{path}: no sample with an image")

    def __len__(self) -> int:
        """Samples with a picture."""
        return len(self._places if self._loaded is None else self._loaded)

    def __getitem__(self, index: int) -> Sample:
        """The sample of that number, its pictures read.

        Raises:
            ValueError: if a picture cannot be read: file, line and picture.
        """
        sample, where = self._sample(index)
        try:
            pictures = tuple(read_picture(path) for path in self._pictures(sample))
        except ValueError as error:
            raise ValueError(f"{self._path}, {where}: {error}") from None
        return Sample(f"{self._path}, {where}", pictures, self._turns(sample, where))

    def unreadable(self, indices: Iterable[int], *, whole: bool) -> Iterator[str]:
        """Messages as ``__getitem__`` would raise them, without stopping at the first."""

        def problems(index: int) -> list[str]:
            sample, where = self._sample(index)
            found = []
            for path in self._pictures(sample):
                try:
                    read_picture(path) if whole else check_header(path)
                except ValueError as error:
                    found.append(f"{self._path}, {where}: {error}")
            return found

        left = iter(dict.fromkeys(indices))
        # Pillow decodes, and disks wait, without Python's lock.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            while part := list(islice(left, NUM_CHECKED_AT_ONCE)):
                for found in pool.map(problems, part):
                    yield from found

    def _load(self, text: bytes, digest: Any) -> None:
        digest.update(text)
        samples = self._parsed(text, "")
        self._loaded = [
            (i, sample) for i, sample in enumerate(samples) if self._counts(sample, f"sample {i}")
        ]

    def _find_lines(self, file: Any, digest: Any) -> None:
        start = 0
        for number, line in enumerate(file, start=1):
            digest.update(line)
            if line.strip():
                where = f"line {number}"
                if self._counts(self._parsed(line, where), where):
                    self._places.append((number, start, len(line)))
            start += len(line)

    def _sample(self, index: int) -> tuple[dict[str, Any], str]:
        """The sample of that number as it was written, and where."""
        if self._loaded is not None:
            number, sample = self._loaded[index]
            return sample, f"sample {number}"
        number, start, size = self._places[index]
        where = f"line {number}"
        with self._path.open("rb") as file:
            file.seek(start)
            sample = self._parsed(file.read(size), where)
        if not self._counts(sample, where):
            raise ValueError(f"{self._path}, {where}: the file has changed since it was opened")
        return sample, where

    def _counts(self, sample: Any, where: str) -> bool:
        """Whether a sample has a picture; one that does is checked."""
        if not isinstance(sample, dict):
            raise ValueError(f"{self._path}, {where}: expected a JSON object")
        if not sample.get("image"):
            return False
        if not all(isinstance(path, str) for path in _paths(sample)):
            raise ValueError(f"{self._path}, {where}: 'image' must be a path or a list of paths")
        self.types.add(self._turns(sample, where)[0].type)
        return True

    def _parsed(self, text: bytes, where: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:  # of JSON, or of UTF-8
            name = ", ".join(filter(None, (str(self._path), where)))
            raise ValueError(f"{name}: not valid JSON: {error}") from None

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
        return turns

    def _pictures(self, sample: dict[str, Any]) -> list[Path]:
        return [self._images / path for path in _paths(sample)]


def _paths(sample: dict[str, Any]) -> list[Any]:
    image = sample["image"]
    return image if isinstance(image, list) else [image]
