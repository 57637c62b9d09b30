"""Recall questions: the sentences and answers that models/recall knows.

    amber : stone .  river : amber .  moss : tin .  moss : oar .  elk : fox .

    ? river =             -> amber = stone </s>           variables: follow the chain to its end
    ? moss =              -> tin : oar </s>               values: all of a key's, in their order
    ? elk ? river .       -> elk = fox ? river = amber .  queries: each key and its value

Held out by construction: a hash of each ordered pair (key, value) puts it in one of two splits
(``needle.split_of``), and every statement of a prompt is of the prompt's split. So what is asked in
an evaluation was never stated in training.

Words here are integers, indices into ``needle.WORDS``; the vocabulary is ``needle.VOCAB``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from vllm_spindle.evaluation.needle import ANSWER, ASK, EOS, IS, STOP, split_of
from vllm_spindle.evaluation.needle_words import WORDS

NUM_STATEMENT_TOKENS = 4


def statement(key: int, value: int) -> list[str]:
    """Tokens of ``key : value .``. [NUM_STATEMENT_TOKENS]."""
    return [WORDS[key], IS, WORDS[value], STOP]


def question(key: int) -> list[str]:
    """Tokens of ``? key =``: for a chain, and for all values of a key."""
    return [ASK, WORDS[key], ANSWER]


def queries_question(keys: Sequence[int]) -> list[str]:
    """Tokens of ``? key ? key .``."""
    return [token for key in keys for token in (ASK, WORDS[key])] + [STOP]


def chain_answer(nodes: Sequence[int]) -> list[str]:
    """Tokens of ``node = node = value </s>``; ``nodes`` without the asked one."""
    return _joined([[WORDS[node]] for node in nodes], ANSWER)


def values_answer(values: Sequence[int]) -> list[str]:
    """Tokens of ``value : value </s>``."""
    return _joined([[WORDS[value]] for value in values], IS)


def queries_answer(pairs: Sequence[tuple[int, int]]) -> list[str]:
    """Tokens of ``key = value ? key = value . </s>``."""
    parts = [[WORDS[key], ANSWER, WORDS[value]] for key, value in pairs]
    return [*_joined(parts, ASK)[:-1], STOP, EOS]


def _joined(parts: Sequence[list[str]], between: str) -> list[str]:
    tokens = [token for part in parts for token in (*part, between)]
    return [*tokens[:-1], EOS]


class Pool:
    """Words in random order, each given out once."""

    def __init__(self, rng: random.Random, split: str) -> None:
        """All of ``WORDS``; ``split`` is that of the pairs."""
        self._words = rng.sample(range(len(WORDS)), len(WORDS))
        self._split = split

    def __len__(self) -> int:
        """Words left."""
        return len(self._words)

    def take(self) -> int:
        """Any word.

        Raises:
            ValueError: if there is none left.
        """
        if not self._words:
            raise ValueError("more statements than the vocabulary has words for")
        return self._words.pop()

    def value_for(self, key: int) -> int:
        """A word that makes a pair of the split with ``key``.

        Raises:
            ValueError: if there is none left.
        """
        for i in range(len(self._words) - 1, -1, -1):
            if split_of((key, self._words[i])) == self._split:
                return self._words.pop(i)
        raise ValueError("more statements than the vocabulary has pairs for")

    def chain(self, num_hops: int) -> list[int]:
        """Words of which each but the last is stated to be the next. [num_hops + 1]."""
        nodes = [self.take()]
        for _ in range(num_hops):
            nodes.append(self.value_for(nodes[-1]))
        return nodes

    def values(self, num_values: int) -> tuple[int, list[int]]:
        """A key and its values."""
        key = self.take()
        return key, [self.value_for(key) for _ in range(num_values)]


def scattered(
    rng: random.Random, sentences: Sequence[list[str]], filler: Sequence[list[str]]
) -> list[list[str]]:
    """Both, mixed at random; each keeps its order."""
    is_filler = [False] * len(sentences) + [True] * len(filler)
    rng.shuffle(is_filler)
    sources = (iter(sentences), iter(filler))
    return [next(sources[which]) for which in is_filler]
