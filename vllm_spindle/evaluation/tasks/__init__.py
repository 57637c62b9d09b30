"""Generated tasks: one file a family, one table of them, the same arguments give the same items."""

import random
from collections.abc import Callable

from vllm_spindle.evaluation.tasks import (
    frequent,
    multikey,
    multiquery,
    multivalue,
    single,
    variables,
)
from vllm_spindle.evaluation.tasks.dialect import Dialect
from vllm_spindle.evaluation.tasks.item import Item

Make = Callable[[Dialect, random.Random, int, float | None], Item]

FAMILIES: dict[str, Make] = {
    "single": single.make,
    "multikey_1": multikey.make_1,
    "multikey_2": multikey.make_2,
    "multikey_3": multikey.make_3,
    "multivalue": multivalue.make,
    "multiquery": multiquery.make,
    "variables": variables.make,
    "frequent": frequent.make,
    "depth": multikey.make_1,
}
DEPTH = "depth"  # the family whose depths form a grid, for the heat map
NUM_DEPTHS = 10
GOLDEN = 0.6180339887498949
OVERHEAD_TOKENS = 24  # of a context's length, left to the question and special tokens


def make_item(family: str, dialect: Dialect, *, prompt_tokens: int, seed: int, index: int) -> Item:
    """The ``index``-th item of a family: the same arguments give the same one.

    Depths are spread evenly over any number of items; those of ``depth`` are the middles of ten
    equal parts in turn.

    Args:
        family: of ``FAMILIES``.
        dialect: of the model.
        prompt_tokens: of the prompt with its question, nearly.
        seed: any integer.
        index: from 0.

    Raises:
        ValueError: if the dialect cannot say it, or the prompt is too short for it.
    """
    if family not in FAMILIES:
        raise ValueError(f"task {family!r} is none of: {', '.join(FAMILIES)}")
    if family not in dialect.families:
        raise ValueError(
            f"task {family!r} cannot be said to a model of the {dialect.name!r} words; it knows "
            f"{', '.join(name for name in FAMILIES if name in dialect.families)}"
        )
    rng = random.Random(f"{family} {dialect.name} {prompt_tokens} {seed} {index}")
    if family == DEPTH:
        depth = (index % NUM_DEPTHS + 0.5) / NUM_DEPTHS
    else:
        depth = (0.5 + index * GOLDEN) % 1
    return FAMILIES[family](dialect, rng, prompt_tokens - OVERHEAD_TOKENS, depth)
