"""The two word dialects: what models/needle and models/recall were trained to read.

Every word is one token of ``needle.VOCAB``, and every fact is of the held-out split.
"""

import random
from collections.abc import Sequence
from typing import Any

from vllm_spindle.evaluation import needle, recall
from vllm_spindle.evaluation.tasks.dialect import Dialect, Pair
from vllm_spindle.evaluation.tasks.item import Ask

SPLIT = "heldout"
SHORTEST_FILLER = needle.FILLER_TOKENS[0]


class Words(Dialect):
    """What both have in common."""

    is_exact = True

    def num_tokens(self, text: str) -> int:
        return len(text.split())

    def filler(self, rng: random.Random, num_tokens: int) -> list[str]:
        if num_tokens < SHORTEST_FILLER:
            return []
        return [" ".join(sentence) for sentence in needle.filler(rng, num_tokens)]

    def instructions(self, rng: random.Random, num_tokens: int) -> str:
        return " ".join(self.filler(rng, max(num_tokens, SHORTEST_FILLER)))


class NeedleWords(Words):
    """Keys of two words, values of three: ``amber river : stone cloud leaf .``"""

    name = "needle"
    families = frozenset({"single", "multikey_1", "multikey_2", "multikey_3", "depth"})

    def pairs(self, rng: random.Random, num_pairs: int) -> list[Pair]:
        used: set[needle.Key] = set()
        keys = [needle.fresh_key(rng, SPLIT, used) for _ in range(num_pairs)]
        return [(key, needle.random_words(rng, needle.NUM_VALUE_WORDS)) for key in keys]

    def close_pairs(self, rng: random.Random, num_pairs: int) -> list[Pair]:
        """Each key shares a word with one of a few."""
        used: set[needle.Key] = set()
        num_roots = max(1, num_pairs // 8)
        keys = [needle.fresh_key(rng, SPLIT, used) for _ in range(num_roots)]
        while len(keys) < num_pairs:
            root, shared = keys[len(keys) % num_roots], len(keys) // num_roots % 2
            keys.append(needle.sharing_key(rng, SPLIT, root, shared, used))
        return [(key, needle.random_words(rng, needle.NUM_VALUE_WORDS)) for key in keys]

    def state(self, pair: Pair) -> str:
        return " ".join(needle.statement(*pair))

    def ask(self, pair: Pair) -> Ask:
        key, value = pair
        question = needle.question(key)
        answer = " ".join(needle.WORDS[word] for word in value)
        return _ask(question, [*question[:-1], needle.STOP], answer)


class RecallWords(Words):
    """Keys and values of one word: ``amber : stone .``; see ``evaluation/recall.py``."""

    name = "recall"
    families = frozenset(
        {"single", "multikey_1", "multikey_2", "multivalue", "multiquery", "variables", "depth"}
    )

    def pairs(self, rng: random.Random, num_pairs: int) -> list[Pair]:
        pool = recall.Pool(rng, SPLIT)
        return [tuple(pool.chain(1)) for _ in range(num_pairs)]

    def state(self, pair: Pair) -> str:
        return " ".join(recall.statement(*pair))

    def ask(self, pair: Pair) -> Ask:
        return self.ask_chain(pair)

    def value_lists(
        self, rng: random.Random, num_keys: int, num_values: int
    ) -> list[tuple[int, list[int]]]:
        pool = recall.Pool(rng, SPLIT)
        return [pool.values(num_values) for _ in range(num_keys)]

    def ask_values(self, key: int, values: Sequence[int]) -> Ask:
        return _recall_ask(recall.question(key), key, recall.values_answer(values))

    def ask_queries(self, pairs: Sequence[Pair]) -> Ask:
        question = recall.queries_question([key for key, _ in pairs])
        answer = recall.queries_answer(pairs)
        return _ask(question, question, " ".join(answer[:-1]))

    def chains(self, rng: random.Random, num_chains: int, num_hops: int) -> list[list[int]]:
        pool = recall.Pool(rng, SPLIT)
        return [pool.chain(num_hops) for _ in range(num_chains)]

    def state_links(self, chain: Sequence[int]) -> list[str]:
        links = [self.state(pair) for pair in zip(chain, chain[1:], strict=False)]
        return links[::-1]

    def ask_chain(self, chain: Sequence[int]) -> Ask:
        return _recall_ask(recall.question(chain[0]), chain[0], recall.chain_answer(chain[1:]))


def _recall_ask(question: list[str], key: int, answer: list[str]) -> Ask:
    # Not "? key .": that is a question of several queries, and would be answered as one.
    return _ask(question, [needle.ASK, needle.IS, needle.WORDS[key]], " ".join(answer[:-1]))


def _ask(question: list[str], stated: list[str], answer: str) -> Ask:
    # The cue is the whole question again: these models know no other.
    return Ask(" ".join(stated), " ".join(question), " ".join(question), answer)


def dialect_of(config: Any) -> str:
    """The word dialect that a model's config names; models/needle names none."""
    return str(getattr(config, "dialect", None) or NeedleWords.name)
