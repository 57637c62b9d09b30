"""The tasks in plain English, for models with any tokenizer.

Wording of our own, of RULER's form: nothing is downloaded, and an answer cue ends each question so
that base models answer too. Keys are ``colour-thing`` pairs of the bundled words, values seven
digits; ``multikey_3`` has hexadecimal keys and values of 32 digits.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

from vllm_spindle.evaluation.needle_words import WORDS
from vllm_spindle.evaluation.tasks.dialect import Dialect, Pair
from vllm_spindle.evaluation.tasks.item import Ask

NOISE = (
    "The grass on the hill is green and the morning is quiet.",
    "A train leaves in the evening and comes back before noon.",
    "Somebody has left a window open, and the wind moves the curtain.",
    "The baker opens at six, as on any other day.",
    "It rained a little, then the sun came out again.",
    "Two children walk along the river and count the boats.",
    "The road goes on behind the trees, and nobody is on it.",
    "There is bread on the table and a chair beside it.",
)
RULE = (
    "Answer in as few words as you can, without any explanation, and do not repeat the question. "
    "Do not add anything that the text does not say. Keep to the order of the text. "
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Text(Dialect):
    """Plain English; lengths are the model's own tokens."""

    name = "text"
    is_exact = False
    families = frozenset(
        {
            "single",
            "multikey_1",
            "multikey_2",
            "multikey_3",
            "multivalue",
            "multiquery",
            "variables",
            "frequent",
            "depth",
        }
    )

    def __init__(self, count_tokens: Callable[[str], int]) -> None:
        """With the model's tokenizer: ``count_tokens`` of a text without special tokens."""
        self._count_tokens = count_tokens
        self._counted: dict[str, int] = {}

    def num_tokens(self, text: str) -> int:
        # A blank in front: what most tokenizers see of a sentence that follows another.
        if text not in self._counted:
            self._counted[text] = self._count_tokens(" " + text)
        return self._counted[text]

    def filler(self, rng: random.Random, num_tokens: int) -> list[str]:
        sentences: list[str] = []
        while True:
            sentence = rng.choice(NOISE)
            num_tokens -= self.num_tokens(sentence)
            if num_tokens < 0:
                return sentences
            sentences.append(sentence)

    def instructions(self, rng: random.Random, num_tokens: int) -> str:
        return RULE * (1 + num_tokens // self.num_tokens(RULE))

    def pairs(self, rng: random.Random, num_pairs: int) -> list[Pair]:
        keys: set[str] = set()
        pairs = []
        while len(pairs) < num_pairs:
            key = "-".join(rng.sample(WORDS, 2))
            if key not in keys:
                keys.add(key)
                pairs.append((key, _digits(rng, 7)))
        return pairs

    def close_pairs(self, rng: random.Random, num_pairs: int) -> list[Pair]:
        def number() -> str:
            return f"{rng.getrandbits(128):032x}"

        return [(number(), number()) for _ in range(num_pairs)]

    def state(self, pair: Pair) -> str:
        return f"One of the secret numbers of {pair[0]} is {pair[1]}."

    def ask(self, pair: Pair) -> Ask:
        question = f"What is the secret number of {pair[0]} in the text?"
        return _ask(question, f" Answer: the secret number of {pair[0]} is", [pair[1]])

    def value_lists(
        self, rng: random.Random, num_keys: int, num_values: int
    ) -> list[tuple[str, list[str]]]:
        return [
            (key, [_digits(rng, 7) for _ in range(num_values)])
            for key, _ in self.pairs(rng, num_keys)
        ]

    def ask_values(self, key: Any, values: Sequence[Any]) -> Ask:
        question = f"What are all the secret numbers of {key} in the text?"
        return _ask(question, f" Answer: the secret numbers of {key} are", values)

    def ask_queries(self, pairs: Sequence[Pair]) -> Ask:
        keys = ", ".join(key for key, _ in pairs)
        question = f"What are the secret numbers of {keys} in the text?"
        cue = f" Answer: the secret numbers of {keys} are, in this order,"
        return _ask(question, cue, [value for _, value in pairs])

    def chains(self, rng: random.Random, num_chains: int, num_hops: int) -> list[list[str]]:
        used: set[str] = set()
        chains = []
        for _ in range(num_chains):
            names: list[str] = []
            while len(names) < num_hops:
                name = "".join(rng.choices(LETTERS, k=5))
                if name not in used:
                    used.add(name)
                    names.append(name)
            chains.append([*names, _digits(rng, 5)])
        return chains

    def state_links(self, chain: Sequence[str]) -> list[str]:
        names, value = chain[:-1], chain[-1]
        told = [f"VAR {names[-1]} = {value}."]
        for name, source in reversed(list(zip(names, names[1:], strict=False))):
            told.append(f"VAR {name} = VAR {source}.")
        return told

    def ask_chain(self, chain: Sequence[str]) -> Ask:
        names, value = chain[:-1], chain[-1]
        question = f"Which variables hold the value {value} in the text?"
        return _ask(question, f" Answer: the variables that hold {value} are", names[::-1])


def _digits(rng: random.Random, num_digits: int) -> str:
    return str(rng.randrange(10 ** (num_digits - 1), 10**num_digits))


def _ask(question: str, cue: str, answers: Sequence[str]) -> Ask:
    return Ask(question, question + cue, cue, " ".join(answers))
