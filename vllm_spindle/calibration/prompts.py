"""The prompts to calibrate on: a file of the user's, or needle questions for the bundled model."""

import json
from pathlib import Path
from typing import Any

SEED = 20261


def load_tokenizer(model: str) -> Any | None:
    """The model's tokenizer; None if it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def load_causal_model(model: str, dtype: str, **options: Any) -> Any:
    """A causal language model, for inference. options: of transformers.

    Raises:
        ValueError: if transformers cannot load it.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"MODEL={model}: transformers cannot load it ({reason})") from None
    return loaded.eval()


def read_prompts(path: str, tokenizer: Any | None, num_prompts: int) -> list[list[int]]:
    """Token ids of the first ``num_prompts`` lines of a file, empty ones skipped.

    A line is text, or a JSON object with ``prompt`` or ``prompt_token_ids``.

    Raises:
        ValueError: if the file or a line cannot be read.
    """
    return [
        token_ids(line, tokenizer, f"--prompts={path}: line {i}")
        for i, line in numbered_lines(path, num_prompts)
    ]


def numbered_lines(path: str, num_lines: int) -> list[tuple[int, str]]:
    """The first ``num_lines`` lines of a file that are not empty, with their numbers.

    Raises:
        ValueError: if it cannot be read, or has none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts={path}: cannot read it ({error})") from None
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()][:num_lines]
    if not numbered:
        raise ValueError(f"--prompts={path}: no prompts in it; one a line, text or JSON")
    return numbered


def needle_prompts(tokenizer: Any, num_prompts: int, num_tokens: int) -> list[list[int]]:
    """Token ids of generated questions, of keys that no test asks for."""
    from vllm_spindle.evaluation.needle import make_questions

    questions = make_questions(num_prompts, num_tokens, seed=SEED, split="train")
    return [tokenizer(question.prompt).input_ids for question in questions]


def speaks_needle(model: str, tokenizer: Any | None) -> bool:
    """Whether this is models/needle: its words, and no other dialect of them (models/recall)."""
    from vllm_spindle.evaluation.needle import VOCAB

    if tokenizer is None or set(tokenizer.get_vocab()) != set(VOCAB):
        return False
    config = Path(model) / "config.json"
    return "dialect" not in json.loads(config.read_text(encoding="utf-8"))


def token_ids(line: str, tokenizer: Any | None, where: str) -> list[int]:
    """Token ids of one line's prompt."""
    prompt: Any = line
    if line.lstrip().startswith("{"):
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not valid JSON: {error}") from None
        prompt = fields.get("prompt_token_ids", fields.get("prompt"))
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    if not isinstance(prompt, str):
        raise ValueError(f'{where}: has no "prompt" (text) or "prompt_token_ids" (integers)')
    if tokenizer is None:
        raise ValueError(f'{where}: the model has no tokenizer; give "prompt_token_ids"')
    return list(tokenizer(prompt).input_ids)
