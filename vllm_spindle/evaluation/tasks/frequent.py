"""The words that come most often (RULER's frequent words extraction), in plain text.

A coded text of made-up words whose counts fall with their rank (rank ** -ALPHA); the three most
frequent are asked for. Nothing else is in the context: every token counts a little, none much.
"""

import random
import string

from vllm_spindle.evaluation.tasks.dialect import Dialect
from vllm_spindle.evaluation.tasks.item import Ask, Item

ALPHA = 2.0
NUM_LETTERS = 6
NUM_ASKED = 3
LEAST_WORDS = 8  # different ones


def make(dialect: Dialect, rng: random.Random, num_tokens: int, depth: float | None) -> Item:
    """A coded text; depth is not used.

    Raises:
        ValueError: if there is no room for a third word that leads the fourth.
    """
    sample = " ".join(_coded_word(rng) for _ in range(50))
    num_words = int(num_tokens * 50 / dialect.num_tokens(sample) * 0.97)
    counts = _counts(num_words)
    if len(set(counts[: NUM_ASKED + 1])) <= NUM_ASKED:
        raise ValueError(f"frequent needs longer prompts: {num_tokens} tokens are too few")
    names: set[str] = set()
    while len(names) < len(counts):
        names.add(_coded_word(rng))
    ranked = rng.sample(sorted(names), len(names))
    words = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
    rng.shuffle(words)
    question = f"Which {NUM_ASKED} made-up words come most often in the text?"
    cue = " Answer: the words that come most often, the first of them first, are"
    ask = Ask(question, question + cue, cue, " ".join(ranked[:NUM_ASKED]))
    return Item(" ".join(words), (ask,))


def _coded_word(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=NUM_LETTERS))


def _counts(num_words: int) -> list[int]:
    """How often each rank comes, most frequent first; at most ``num_words`` in all."""
    num_ranks = max(LEAST_WORDS, num_words // 50)
    weights = [(rank + 1) ** -ALPHA for rank in range(num_ranks)]
    counts = [int(num_words * weight / sum(weights)) for weight in weights]
    return [count for count in counts if count]
