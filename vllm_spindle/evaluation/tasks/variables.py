"""Names that stand for names that stand for a value (RULER's variable tracking)."""

import random

from vllm_spindle.evaluation.tasks.dialect import Dialect
from vllm_spindle.evaluation.tasks.haystack import hide
from vllm_spindle.evaluation.tasks.item import Item

NUM_CHAINS, NUM_HOPS = 4, 4
NUM_ASKS = 3


def make(dialect: Dialect, rng: random.Random, num_tokens: int, depth: float | None) -> Item:
    """Four chains of four hops, told in one mixed order; depth is not used."""
    chains = dialect.chains(rng, NUM_CHAINS, NUM_HOPS)
    links = [dialect.state_links(chain) for chain in chains]
    # Each chain keeps its order: a name is told before it is used.
    order = [i for i, sentences in enumerate(links) for _ in sentences]
    rng.shuffle(order)
    sources = [iter(sentences) for sentences in links]
    haystack = hide(dialect, rng, [next(sources[i]) for i in order], num_tokens)
    return Item(haystack.text, tuple(dialect.ask_chain(chain) for chain in chains[:NUM_ASKS]))
