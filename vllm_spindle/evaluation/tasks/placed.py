"""A question that knows where its fact stands."""

from dataclasses import replace

from vllm_spindle.evaluation.tasks.item import Ask


def at(ask: Ask, depth: float) -> Ask:
    """The question, its fact at ``depth``."""
    return replace(ask, needle_depth=depth)
