"""Which text tokens a pruning module reads with an image: plain lists of token ids.

The server's processor and the transformers twin both call this on the unexpanded prompt (one
placeholder per image). The context ends with the image's own turn, so that a growing chat keeps
it, and with it the choice of rows and every cached prefix.
"""

from collections.abc import Collection, Sequence
from typing import Any

MAX_TEXT_TOKENS = 128
"""Default length of a context: the last tokens of it are the question."""

CONTENT = "Hello"


def text_context(
    prompt_ids: Sequence[int],
    image_span_end: int,
    placeholder_ids: Collection[int],
    turn_end_ids: Sequence[Sequence[int]],
    max_tokens: int,
) -> list[int]:
    """Text from the start of the prompt to the end of the image's turn, its last tokens.

    The turn ends before the first of ``turn_end_ids`` at or after the image, else with the
    prompt. For example with 9 = image, 7 8 = turn end and two tokens at most:
    ``[1, 9, 2, 3, 7, 8, 4]`` gives ``[2, 3]``.

    Args:
        prompt_ids: the unexpanded prompt.
        image_span_end: index after the image's placeholder, 0 to ``len(prompt_ids)``.
        placeholder_ids: ids that are no text: placeholders, and special tokens.
        turn_end_ids: token sequences that end a turn, from ``turn_end_sequences``.
        max_tokens: length at most.

    Raises:
        ValueError: if ``image_span_end`` or ``max_tokens`` is out of range.
    """
    if not 0 <= image_span_end <= len(prompt_ids):
        raise ValueError(f"image_span_end must be in [0, {len(prompt_ids)}], got {image_span_end}")
    if max_tokens < 0:
        raise ValueError(f"max_tokens must be at least 0, got {max_tokens}")
    end = _turn_end(prompt_ids, image_span_end, turn_end_ids)
    excluded = frozenset(placeholder_ids)
    context = [token for token in prompt_ids[:end] if token not in excluded]
    return context[max(0, len(context) - max_tokens) :]


def _turn_end(prompt_ids: Sequence[int], start: int, turn_end_ids: Sequence[Sequence[int]]) -> int:
    prompt = list(prompt_ids)
    sequences = [list(sequence) for sequence in turn_end_ids if sequence]
    firsts = {sequence[0] for sequence in sequences}
    for i in range(start, len(prompt)):
        if prompt[i] in firsts and any(prompt[i : i + len(s)] == s for s in sequences):
            return i
    return len(prompt)


def turn_end_sequences(tokenizer: Any, chat_template: str | None = None) -> list[list[int]]:
    """Token sequences that end a user's turn, read off a chat template.

    They are what follows the content of a user message, and what the generation prompt adds; each
    after nothing, a space and a line break, which tokenizers write differently. And the
    end-of-text token. Without a template, that one alone.

    Args:
        tokenizer: a transformers tokenizer.
        chat_template: the processor's, where it has one; None for the tokenizer's own.
    """
    sequences: list[list[int]] = []
    for text in _turn_end_texts(tokenizer, chat_template):
        for ids in _spellings(tokenizer, text):
            if ids and ids not in sequences:
                sequences.append(ids)
    eos = tokenizer.eos_token_id
    if eos is not None and [eos] not in sequences:
        sequences.append([eos])
    return sequences


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokenizer's special tokens, which are no text."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added if token.special}


def _spellings(tokenizer: Any, text: str) -> list[list[int]]:
    def encode(string: str) -> list[int]:
        return list(tokenizer.encode(string, add_special_tokens=False))

    newline, after_newline = encode("\n"), encode("\n" + text)
    spellings = [encode(text), encode(" " + text)]
    if after_newline[: len(newline)] == newline:
        spellings.append(after_newline[len(newline) :])
    return spellings


def _turn_end_texts(tokenizer: Any, chat_template: str | None) -> list[str]:
    rendered = _render(tokenizer, chat_template, add_generation_prompt=False)
    prompted = _render(tokenizer, chat_template, add_generation_prompt=True)
    texts = []
    if CONTENT in rendered:
        texts.append(rendered.rpartition(CONTENT)[2])
    if prompted.startswith(rendered):
        texts.append(prompted[len(rendered) :])
    return [text.strip() for text in texts if text.strip()]


def _render(tokenizer: Any, chat_template: str | None, *, add_generation_prompt: bool) -> str:
    """One user message through the chat template; empty where that cannot be had.

    Some templates take the content as a string, some as a list of parts.
    """
    for content in (CONTENT, [{"type": "text", "text": CONTENT}]):
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception:  # a template may raise anything; it is the user's file
            continue
        if CONTENT in text:
            return str(text)
    return ""
