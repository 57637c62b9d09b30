"""Facts among facts of the same form (RULER's niah_multikey).

``multikey_1``: eight facts in filler. ``multikey_2``: nothing but facts. ``multikey_3``: nothing
but facts, and keys easily taken for one another.
"""

import random
from collections.abc import Callable

from vllm_spindle.evaluation.tasks.dialect import Dialect, Pair
from vllm_spindle.evaluation.tasks.haystack import hide
from vllm_spindle.evaluation.tasks.item import Item
from vllm_spindle.evaluation.tasks.placed import at

NUM_FACTS = 8  # of multikey_1
NUM_ASKS = 4
MOST_FACTS = 180  # beyond, the words of a small vocabulary run out; filler takes the rest


def make_1(dialect: Dialect, rng: random.Random, num_tokens: int, depth: float | None) -> Item:
    """A few facts in filler."""
    return _item(dialect, rng, dialect.pairs(rng, NUM_FACTS), num_tokens, depth)


def make_2(dialect: Dialect, rng: random.Random, num_tokens: int, depth: float | None) -> Item:
    """As many facts as fit."""
    return _item(dialect, rng, _as_many(dialect, rng, num_tokens, dialect.pairs), num_tokens, depth)


def make_3(dialect: Dialect, rng: random.Random, num_tokens: int, depth: float | None) -> Item:
    """As many facts as fit, with close keys."""
    pairs = _as_many(dialect, rng, num_tokens, dialect.close_pairs)
    return _item(dialect, rng, pairs, num_tokens, depth)


def _as_many(
    dialect: Dialect,
    rng: random.Random,
    num_tokens: int,
    draw: Callable[[random.Random, int], list[Pair]],
) -> list[Pair]:
    each = max(dialect.num_tokens(dialect.state(pair)) for pair in draw(rng, NUM_FACTS))
    return draw(rng, max(NUM_ASKS, min(MOST_FACTS, num_tokens // each - 1)))


def _item(
    dialect: Dialect, rng: random.Random, pairs: list[Pair], num_tokens: int, depth: float | None
) -> Item:
    # The asked one first: hide() puts the first at the depth.
    haystack = hide(dialect, rng, list(map(dialect.state, pairs)), num_tokens, depth=depth)
    asked = [0, *rng.sample(range(1, len(pairs)), NUM_ASKS - 1)]
    return Item(haystack.text, tuple(at(dialect.ask(pairs[i]), haystack.depths[i]) for i in asked))
