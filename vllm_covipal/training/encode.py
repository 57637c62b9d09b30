"""Samples as the frozen LVLM sees them: visual rows once, and a token sequence per question.

Shapes: N visual rows of a sample, D width, L tokens of prompt and answer.

Answers are in the sequences, for the language model. They are not in the text contexts, which is
all of the text that a pruning module ever gets: those end with the image's turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_covipal import hf
from vllm_covipal.core.text_context import special_ids, text_context, turn_end_sequences
from vllm_covipal.hf_families import EncodedItem
from vllm_covipal.training.samples import PLACEHOLDER, Sample, Turn


@dataclass(frozen=True, slots=True)
class Sequenced:
    """One question with its answer.

    Attributes:
        ids: [L], placeholders expanded.
        num_prompt: tokens before the answer.
        starts: index of each item's first row.
        media_end: index after the last item.
        text_ids: text context of each item, prompt only.
        positions: [L], or [3, L] under M-RoPE.
    """

    ids: Tensor
    num_prompt: int
    starts: tuple[int, ...]
    media_end: int
    text_ids: tuple[list[int], ...]
    positions: Tensor


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """Pictures' rows and the questions about them."""

    items: tuple[EncodedItem, ...]
    sequences: tuple[Sequenced, ...]


def chat_prompt(processor: Any, question: str, num_images: int) -> str:
    """The prompt of a question, through the chat template if there is one.

    Args:
        processor: of the LVLM; its template, or else its tokenizer's, as a server takes them.
        question: with ``PLACEHOLDER`` where a picture stands; those that it lacks come first.
        num_images: of the sample.
    """
    return _rendered(processor, question, num_images, None)


def answered(processor: Any, turn: Turn, num_images: int) -> tuple[str, str]:
    """Prompt and answer as text, the end of the turn included in the answer."""
    prompt = chat_prompt(processor, turn.question, num_images)
    whole = _rendered(processor, turn.question, num_images, turn.answer)
    spoken = whole[len(prompt) :]
    # A template that knows no parts would print the list of them.
    if whole.startswith(prompt) and turn.answer in spoken and "'type'" not in spoken:
        return prompt, spoken.rstrip("\n")
    return prompt, f" {turn.answer}"


def _rendered(processor: Any, question: str, num_images: int, answer: str | None) -> str:
    parts = question.split(PLACEHOLDER)
    parts = [""] * (num_images + 1 - len(parts)) + parts
    texts = [part.strip() for part in parts[: num_images + 1]]
    tokenizer = processor.tokenizer
    if not processor.chat_template and not tokenizer.chat_template:
        joined = f"{processor.image_token}\n".join(texts)
        return joined if answer is None else f"{joined} {answer}"
    content: list[dict[str, str]] = []
    for i, text in enumerate(texts):
        if i:
            content.append({"type": "image"})
        if text:
            content.append({"type": "text", "text": text})
    messages = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})

    def rendered(messages: list[dict[str, Any]]) -> str:
        own = None if processor.chat_template else tokenizer.get_chat_template()
        return str(
            processor.apply_chat_template(
                messages, chat_template=own, add_generation_prompt=answer is None
            )
        )

    try:
        return rendered(messages)
    except Exception:  # a template may take an assistant's words as a string only
        if answer is not None:
            messages[1] = {"role": "assistant", "content": answer}  # type: ignore[dict-item]
        return rendered(messages)


class Encoder:
    """Encodes samples for one LVLM."""

    def __init__(
        self, model: Any, processor: Any, *, max_text_tokens: int, max_answer_tokens: int
    ) -> None:
        """Args: as in the recipe."""
        self.model, self.processor = model, processor
        self.max_text_tokens, self.max_answer_tokens = max_text_tokens, max_answer_tokens
        tokenizer = processor.tokenizer
        self._image_id = model.config.image_token_id
        video_id = getattr(model.config, "video_token_id", None)
        self._excluded = special_ids(tokenizer) | ({self._image_id, video_id} - {None})
        self._turn_ends = turn_end_sequences(tokenizer, getattr(processor, "chat_template", None))

    @torch.no_grad()
    def __call__(self, sample: Sample, turns: Sequence[Turn]) -> EncodedSample:
        """The sample's rows and a sequence for each of ``turns``.

        Raises:
            ValueError: naming the sample, if the processor does not take its pictures, or a
                prompt has not one placeholder for each.
        """
        num_images = len(sample.images)
        token = self.processor.image_token
        if any(token in turn.question.replace(PLACEHOLDER, "") + turn.answer for turn in turns):
            raise ValueError(f"{sample.name}: {token} in a text would stand for a picture")
        texts = [answered(self.processor, turn, num_images) for turn in turns]
        try:
            encoded = hf.encode_prompt(
                self.model, self.processor, texts[0][0], images=sample.images
            )
            sequences = tuple(self._sequence(prompt, answer, encoded) for prompt, answer in texts)
        except ValueError as error:
            raise ValueError(f"{sample.name}: {error}") from None
        return EncodedSample(encoded.items, sequences)

    def _sequence(self, prompt: str, answer: str, encoded: hf.EncodedPrompt) -> Sequenced:
        tokenizer = self.processor.tokenizer
        shrunk = list(tokenizer(prompt)["input_ids"])
        spoken = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
        places = [i for i, token in enumerate(shrunk) if token == self._image_id]
        if len(places) != len(encoded.items):
            raise ValueError(f"{len(places)} placeholders for {len(encoded.items)} pictures")
        ids: list[int] = []
        starts, done = [], 0
        for place, item in zip(places, encoded.items, strict=True):
            ids += shrunk[done:place]
            starts.append(len(ids))
            ids += [self._image_id] * item.rows.shape[0]
            done = place + 1
        media_end = len(ids)
        ids += shrunk[done:]
        num_prompt = len(ids)
        ids += spoken[: self.max_answer_tokens]
        tensor = torch.tensor(ids, device=encoded.prompt_ids.device)
        contexts = tuple(
            text_context(shrunk, place + 1, self._excluded, self._turn_ends, self.max_text_tokens)
            for place in places
        )
        positions = self._positions(tensor, encoded.inputs)
        return Sequenced(tensor, num_prompt, tuple(starts), media_end, contexts, positions)

    def _positions(self, ids: Tensor, inputs: dict[str, Any]) -> Tensor:
        get_rope_index = getattr(self.model.model, "get_rope_index", None)
        if get_rope_index is None:
            return torch.arange(ids.shape[0], device=ids.device)
        positions, _ = get_rope_index(
            ids.unsqueeze(0),
            (ids == self._image_id).int().unsqueeze(0),
            image_grid_thw=inputs["image_grid_thw"],
        )
        return positions[:, 0]  # type: ignore[no-any-return]
