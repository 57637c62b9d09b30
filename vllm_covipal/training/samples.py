"""What a sample is, and what gives them by number."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from PIL import Image

PLACEHOLDER = "<image>"


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


class Source(ABC):
    """Samples by number: the same number gives the same sample."""

    types: Collection[str]
    """Types of question there are."""
    digest: str = ""
    """Of what the samples are read from; empty where the recipe says it all."""

    @abstractmethod
    def __len__(self) -> int:
        """Samples there are."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """The sample of this number, in [0, len)."""

    def unreadable(self, indices: Iterable[int], *, whole: bool) -> Iterator[str]:
        """What is wrong with pictures of these samples, one line each; generated ones are fine.

        Args:
            indices: numbers of samples; one that comes again is looked at once.
            whole: read them through, rather than see that there is a picture.
        """
        return iter(())
