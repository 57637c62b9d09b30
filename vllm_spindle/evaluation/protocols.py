"""Where the question stands when the cache is reduced: the same items, put in five ways.

``question_last``: at the end of the prompt; a window of last tokens sees it.
``question_first``: in front of the context; the cue comes after the reduction.
``instructions_after``: behind the context, then instructions longer than the window; then the cue.
``in_turn``: several questions over one reduced cache; only the first was in the prompt.
``after_compression``: the question is seen by nobody before the reduction (query-agnostic).
"""

import random
from collections.abc import Callable

from vllm_spindle.evaluation.tasks.dialect import Dialect
from vllm_spindle.evaluation.tasks.item import Item, Sample

INSTRUCTION_TOKENS = 96  # longer than any method's window
PARAGRAPH = {True: " ", False: "\n\n"}  # between a context and a question, exact dialects or not


def make_sample(protocol: str, dialect: Dialect, item: Item, seed: int) -> Sample:
    """The item as a protocol puts it.

    Args:
        protocol: of ``PROTOCOLS``.
        dialect: that made the item.
        item: context and questions.
        seed: of the instructions.

    Raises:
        ValueError: if the item has one question and the protocol needs several.
    """
    gap = PARAGRAPH[dialect.is_exact]
    prompt, followups, num_asked = PROTOCOLS[protocol](dialect, item, gap, seed)
    answers = tuple(ask.answer for ask in item.asks[:num_asked])
    return Sample(prompt, followups, answers, dialect.is_exact, item.asks[0].needle_depth)


def _question_last(dialect: Dialect, item: Item, gap: str, seed: int) -> "Put":
    return item.context + gap + item.asks[0].final, ("",), 1


def _question_first(dialect: Dialect, item: Item, gap: str, seed: int) -> "Put":
    ask = item.asks[0]
    return ask.stated + gap + item.context, (gap + ask.cue.lstrip(),), 1


def _instructions_after(dialect: Dialect, item: Item, gap: str, seed: int) -> "Put":
    ask = item.asks[0]
    rng = random.Random(f"instructions {seed} {ask.stated}")
    instructions = dialect.instructions(rng, INSTRUCTION_TOKENS)
    prompt = gap.join((item.context, ask.stated, instructions))
    return prompt, (gap + ask.cue.lstrip(),), 1


def _in_turn(dialect: Dialect, item: Item, gap: str, seed: int) -> "Put":
    if len(item.asks) < 2:
        raise ValueError("in_turn needs a task with several questions")
    first, *others = (gap + ask.final for ask in item.asks)
    return item.context + first, ("", *others), len(item.asks)


def _after_compression(dialect: Dialect, item: Item, gap: str, seed: int) -> "Put":
    return item.context, (gap + item.asks[0].final,), 1


Put = tuple[str, tuple[str, ...], int]  # prompt, follow-ups, how many questions
PROTOCOLS: dict[str, Callable[[Dialect, Item, str, int], Put]] = {
    "question_last": _question_last,
    "question_first": _question_first,
    "instructions_after": _instructions_after,
    "in_turn": _in_turn,
    "after_compression": _after_compression,
}
# All that a server can be asked: it reduces a prompt whole, question included.
SERVED = ("question_last", "question_first", "instructions_after")


def rights(sample: Sample, said: list[str]) -> list[float]:
    """How right each answer is. [0, 1] each: 0 or 1 where the answer is to be exact."""
    return [
        _right(text, answer, sample.is_exact)
        for text, answer in zip(said, sample.answers, strict=True)
    ]


def _right(text: str, answer: str, is_exact: bool) -> float:
    if is_exact:
        return float(text.split() == answer.split())
    words = answer.lower().split()
    return sum(word in text.lower() for word in words) / len(words)
