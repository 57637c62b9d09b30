"""Sentences hidden in filler, at random or at a depth."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_spindle.evaluation.tasks.dialect import Dialect


@dataclass(frozen=True, slots=True)
class Haystack:
    """A context.

    Attributes:
        text: the context.
        depths: where each hidden sentence starts, over the context's tokens. [0, 1).
    """

    text: str
    depths: tuple[float, ...]


def hide(
    dialect: Dialect,
    rng: random.Random,
    hidden: Sequence[str],
    num_tokens: int,
    *,
    depth: float | None = None,
) -> Haystack:
    """The hidden sentences in their order among filler, ``num_tokens`` together or a little less.

    Args:
        dialect: says the filler.
        rng: of the places.
        hidden: sentences, one or more.
        num_tokens: of the context.
        depth: where the first hidden sentence is to stand, [0, 1]; None for anywhere. The others
            then stand anywhere.

    Raises:
        ValueError: if the hidden sentences alone are longer.
    """
    num_hidden_tokens = sum(map(dialect.num_tokens, hidden))
    if num_hidden_tokens > num_tokens:
        raise ValueError(
            f"a context of {num_tokens} tokens is too short: its facts alone are "
            f"{num_hidden_tokens}; ask for longer prompts"
        )
    filler = dialect.filler(rng, num_tokens - num_hidden_tokens)
    loose = list(hidden) if depth is None else list(hidden[1:])
    order = [True] * len(loose) + [False] * len(filler)
    rng.shuffle(order)
    sources = iter(loose), iter(filler)
    sentences = [next(sources[0 if is_hidden else 1]) for is_hidden in order]
    places = [i for i, is_hidden in enumerate(order) if is_hidden]
    if depth is not None:
        place = _place(dialect, sentences, depth)
        sentences.insert(place, hidden[0])
        places = [place] + [i + (i >= place) for i in places]
    starts, start = [], 0
    for sentence in sentences:
        starts.append(start)
        start += dialect.num_tokens(sentence)
    depths = tuple(starts[i] / max(1, start) for i in places)
    return Haystack(dialect.join(sentences), depths)


def _place(dialect: Dialect, sentences: Sequence[str], depth: float) -> int:
    """How many sentences come before ``depth``."""
    lengths = list(map(dialect.num_tokens, sentences))
    before, limit = 0, depth * sum(lengths)
    for i, length in enumerate(lengths):
        if before + length / 2 > limit:
            return i
        before += length
    return len(sentences)
