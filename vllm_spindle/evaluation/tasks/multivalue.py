"""All values of a key that has several (RULER's niah_multivalue)."""

import random

from vllm_spindle.evaluation.tasks.dialect import Dialect
from vllm_spindle.evaluation.tasks.haystack import hide
from vllm_spindle.evaluation.tasks.item import Item

NUM_KEYS, NUM_VALUES = 4, 4
NUM_ASKS = 3


def make(dialect: Dialect, rng: random.Random, num_tokens: int, depth: float | None) -> Item:
    """Keys with several values each, all told in one mixed order; depth is not used."""
    lists = dialect.value_lists(rng, NUM_KEYS, NUM_VALUES)
    facts = [(key, value) for key, values in lists for value in values]
    rng.shuffle(facts)
    haystack = hide(dialect, rng, list(map(dialect.state, facts)), num_tokens)
    asks = []
    for key, _ in lists[:NUM_ASKS]:
        asks.append(dialect.ask_values(key, [value for other, value in facts if other == key]))
    return Item(haystack.text, tuple(asks))
