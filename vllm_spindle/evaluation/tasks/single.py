"""One fact in filler (RULER's niah_single)."""

import random

from vllm_spindle.evaluation.tasks.dialect import Dialect
from vllm_spindle.evaluation.tasks.haystack import hide
from vllm_spindle.evaluation.tasks.item import Item
from vllm_spindle.evaluation.tasks.placed import at


def make(dialect: Dialect, rng: random.Random, num_tokens: int, depth: float | None) -> Item:
    """A context of one fact."""
    pair = dialect.pairs(rng, 1)[0]
    haystack = hide(dialect, rng, [dialect.state(pair)], num_tokens, depth=depth)
    return Item(haystack.text, (at(dialect.ask(pair), haystack.depths[0]),))
