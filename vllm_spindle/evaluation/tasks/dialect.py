"""How a fact is said, asked for and hidden: what differs between word models and plain text."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from vllm_spindle.evaluation.tasks.item import Ask

Pair = tuple[Any, Any]  # key and value, in whatever form a dialect has them


class Dialect(ABC):
    """Sentences of one kind of model.

    Attributes:
        name: for tables and file names.
        families: tasks that can be said in it.
        is_exact: see ``item.Sample``.
    """

    name: str
    families: frozenset[str]
    is_exact: bool

    @abstractmethod
    def num_tokens(self, text: str) -> int:
        """Tokens of a text in the middle of a prompt."""

    @abstractmethod
    def filler(self, rng: random.Random, num_tokens: int) -> list[str]:
        """Sentences that say nothing, ``num_tokens`` together or a little less."""

    @abstractmethod
    def instructions(self, rng: random.Random, num_tokens: int) -> str:
        """What may follow a question in a prompt, ``num_tokens`` or more."""

    @abstractmethod
    def pairs(self, rng: random.Random, num_pairs: int) -> list[Pair]:
        """Facts of different keys."""

    @abstractmethod
    def state(self, pair: Pair) -> str:
        """The sentence of a fact."""

    @abstractmethod
    def ask(self, pair: Pair) -> Ask:
        """The question for a fact."""

    def join(self, sentences: Sequence[str]) -> str:
        """One text."""
        return " ".join(sentences)

    def close_pairs(self, rng: random.Random, num_pairs: int) -> list[Pair]:
        """Facts whose keys are easily taken for one another."""
        raise NotImplementedError

    def value_lists(
        self, rng: random.Random, num_keys: int, num_values: int
    ) -> list[tuple[Any, list[Any]]]:
        """Keys, each with several values."""
        raise NotImplementedError

    def ask_values(self, key: Any, values: Sequence[Any]) -> Ask:
        """The question for all values of a key, in the order of the text."""
        raise NotImplementedError

    def ask_queries(self, pairs: Sequence[Pair]) -> Ask:
        """One question for several facts."""
        raise NotImplementedError

    def chains(self, rng: random.Random, num_chains: int, num_hops: int) -> list[list[Any]]:
        """Names of which each stands for the next; the last is a value. [num_hops + 1] each."""
        raise NotImplementedError

    def state_links(self, chain: Sequence[Any]) -> list[str]:
        """The sentences of a chain, in the order to be told."""
        raise NotImplementedError

    def ask_chain(self, chain: Sequence[Any]) -> Ask:
        """The question that takes the whole chain to answer."""
        raise NotImplementedError
