"""What a profile is measured on: the user's prompts with their follow-ups, or generated tasks."""

import json
from collections.abc import Sequence
from itertools import product
from typing import Any

from vllm_spindle.calibration.profile import Question
from vllm_spindle.calibration.prompts import SEED, numbered_lines, token_ids
from vllm_spindle.evaluation.tasks import DEPTH, FAMILIES, make_item
from vllm_spindle.evaluation.tasks.dialect import Dialect

MOST_FOLLOWUPS = 6  # of one context: more answers for one prefill, whose tokens are all dense
IN_PROMPT = "in the prompt"
PLACES = (IN_PROMPT, "behind it")


def generated_questions(
    tokenizer: Any, dialect: Dialect, lengths: Sequence[int], num_prompts: int
) -> list[Question]:
    """Every task that a model can be asked, in turn: its question in the prompt, and behind it.

    Of a seed that no evaluation uses.

    Args:
        tokenizer: the model's.
        dialect: what it reads.
        lengths: of the prompts, tokens, in turn.
        num_prompts: how many.
    """
    families = [name for name in FAMILIES if name in dialect.families and name != DEPTH]
    kinds = list(product(lengths, families, PLACES))

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    gap = " " if dialect.is_exact else "\n\n"
    questions = []
    for index in range(num_prompts):
        length, family, place = kinds[index % len(kinds)]
        item = make_item(family, dialect, prompt_tokens=length, seed=SEED, index=index)
        asked = [gap + ask.final for ask in item.asks[:MOST_FOLLOWUPS]]
        context, followups = item.context, [ids(text) for text in asked]
        if place == IN_PROMPT:
            context, followups = context + asked[0], [[], *followups[1:]]
        num_new = max(len(ids(ask.answer)) for ask in item.asks) + 2
        questions.append(Question(list(tokenizer(context).input_ids), followups, num_new))
    return questions


def read_questions(
    path: str, tokenizer: Any | None, num_prompts: int, num_new: int
) -> list[Question]:
    """The first ``num_prompts`` lines of a file, empty ones skipped.

    A line is text, or a JSON object with ``prompt`` or ``prompt_token_ids`` and, if it is to be
    asked more, ``followups``, a list of texts.

    Raises:
        ValueError: if the file or a line cannot be read.
    """
    questions = []
    for number, line in numbered_lines(path, num_prompts):
        where = f"--prompts={path}: line {number}"
        prompt = token_ids(line, tokenizer, where)
        texts = json.loads(line).get("followups", []) if line.lstrip().startswith("{") else []
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"{where}: 'followups' must be a list of texts")
        if texts and tokenizer is None:
            raise ValueError(f"{where}: the model has no tokenizer to read follow-ups with")
        followups = [list(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
        questions.append(Question(prompt, [[], *followups], num_new))
    return questions
