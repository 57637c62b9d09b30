"""Several keys in one question (RULER's niah_multiquery)."""

import random

from vllm_spindle.evaluation.tasks.dialect import Dialect
from vllm_spindle.evaluation.tasks.haystack import hide
from vllm_spindle.evaluation.tasks.item import Item

NUM_FACTS, NUM_QUERIES = 12, 4
NUM_ASKS = 2


def make(dialect: Dialect, rng: random.Random, num_tokens: int, depth: float | None) -> Item:
    """Facts in filler, asked for four at a time; depth is not used."""
    pairs = dialect.pairs(rng, NUM_FACTS)
    haystack = hide(dialect, rng, list(map(dialect.state, pairs)), num_tokens)
    asked = rng.sample(pairs, NUM_ASKS * NUM_QUERIES)
    groups = [asked[i::NUM_ASKS] for i in range(NUM_ASKS)]
    return Item(haystack.text, tuple(map(dialect.ask_queries, groups)))
