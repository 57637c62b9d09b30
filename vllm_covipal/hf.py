"""CoViPAL in transformers: the same choice and the same prompt as the server's, offline.

The server's twin in tests, and the way to prune where there is no server: training, evaluation,
pictures. LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL; one prompt at a time.

Shapes: L tokens of the expanded prompt, N rows of an item, K rows kept, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_covipal.core.budget import kept_tokens
from vllm_covipal.core.text_context import (
    MAX_TEXT_TOKENS,
    special_ids,
    text_context,
    turn_end_sequences,
)
from vllm_covipal.core.visual_item import VisualItem
from vllm_covipal.hf_families import FAMILIES, EncodedItem
from vllm_covipal.selectors import Selector


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt whose media are encoded and not pruned.

    Attributes:
        prompt_ids: expanded, a placeholder per row. [L], int64.
        items: images and videos in the order of the prompt.
        text_ids: text context of each item, whole: a selector reads the last tokens of it.
        positions: M-RoPE positions of the unpruned prompt. [3, L]; None for one-dimensional RoPE.
        next_position: position of the first generated token under M-RoPE.
        inputs: what the processor returned, for pictures.
    """

    prompt_ids: Tensor
    items: tuple[EncodedItem, ...]
    text_ids: tuple[list[int], ...]
    positions: Tensor | None
    next_position: int
    inputs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PrunedPrompt:
    """What is left of a prompt for the language model.

    Attributes:
        embeddings: [1, P, D].
        positions: original M-RoPE positions of what is left, [3, 1, P]; None where positions
            are consecutive.
        next_position: of the first generated token, under M-RoPE.
        kept_rows: per item, ascending.
    """

    embeddings: Tensor
    positions: Tensor | None
    next_position: int
    kept_rows: tuple[Tensor, ...]


def encode_prompt(
    model: Any,
    processor: Any,
    prompt: str,
    *,
    images: Sequence[Any] | None = None,
    videos: Sequence[Any] | None = None,
) -> EncodedPrompt:
    """Run the processor and the vision tower.

    Args:
        model: a ``...ForConditionalGeneration`` of a family above.
        processor: its processor.
        prompt: with one placeholder per image or video, chat template applied.
        images: PIL images, in the order of their placeholders.
        videos: arrays of frames, likewise.

    Raises:
        ValueError: if the model's family is not supported.
    """
    if model.config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"model type must be one of {known}, got {model.config.model_type!r}")
    media = {"images": images, "videos": videos}
    inputs = processor(
        text=[prompt], return_tensors="pt", **{name: m for name, m in media.items() if m}
    )
    inputs = dict(inputs.to(model.device))
    with torch.no_grad():
        of_images, of_videos = FAMILIES[model.config.model_type](model, inputs)
    ids = inputs["input_ids"][0]
    image_id, video_id = model.config.image_token_id, getattr(model.config, "video_token_id", None)
    items = _place(ids.tolist(), {image_id: of_images, video_id: of_videos})
    tokenizer = processor.tokenizer
    excluded = special_ids(tokenizer) | ({image_id, video_id} - {None})
    turn_ends = turn_end_sequences(tokenizer, getattr(processor, "chat_template", None))
    text_ids = tuple(
        text_context(shrunk, end, excluded, turn_ends, len(shrunk))
        for shrunk, end in _shrunk_spans(ids.tolist(), items)
    )
    positions, next_position = _positions(model, inputs)
    return EncodedPrompt(ids, items, text_ids, positions, next_position, inputs)


def visual_items(
    model: Any, encoded: EncodedPrompt, keep_ratio: float, max_text_tokens: int = MAX_TEXT_TOKENS
) -> list[VisualItem]:
    """The prompt's media as a selector sees them that reads so much text."""
    embed = model.get_input_embeddings()
    items = []
    for item, text_ids in zip(encoded.items, encoded.text_ids, strict=True):
        num_rows = item.rows.shape[0]
        mask = item.structure_mask
        num_candidates = num_rows if mask is None else num_rows - int(mask.sum())
        read = text_ids[max(0, len(text_ids) - max_text_tokens) :]
        with torch.no_grad():
            text = embed(torch.tensor(read, dtype=torch.int64, device=item.rows.device))
        num_kept = kept_tokens(num_candidates, keep_ratio)
        items.append(VisualItem(item.rows, text, mask, item.grids, num_kept))
    return items


def prune_prompt(
    model: Any, encoded: EncodedPrompt, *, keep_ratio: float, selector: Selector
) -> PrunedPrompt:
    """Drop the rows that the selector does not keep.

    Kept tokens and text have consecutive positions under one-dimensional RoPE, and under M-RoPE
    exactly those of the unpruned prompt.
    """
    kept_rows = selector.select(visual_items(model, encoded, keep_ratio, selector.max_text_tokens))
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(encoded.prompt_ids).clone()
    is_kept = torch.ones_like(encoded.prompt_ids, dtype=torch.bool)
    for item, rows in zip(encoded.items, kept_rows, strict=True):
        span = slice(item.start, item.start + item.rows.shape[0])
        embeddings[span] = item.rows.to(embeddings.dtype)
        is_kept[span] = False
        is_kept[item.start + rows] = True
    positions = None if encoded.positions is None else encoded.positions[:, None, is_kept]
    return PrunedPrompt(
        embeddings[is_kept].unsqueeze(0), positions, encoded.next_position, tuple(kept_rows)
    )


@torch.no_grad()
def generate_greedy(model: Any, pruned: PrunedPrompt, *, max_new_tokens: int) -> list[int]:
    """Greedy continuation of a pruned prompt, the stop token left out."""
    eos = model.generation_config.eos_token_id
    stop = set(eos) if isinstance(eos, list) else {eos}
    step = {"inputs_embeds": pruned.embeddings}
    if pruned.positions is not None:
        step["position_ids"] = pruned.positions
    cache, tokens = None, []
    for position in range(pruned.next_position, pruned.next_position + max_new_tokens):
        output = model(**step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = output.logits[0, -1].argmax()
        if int(token) in stop:
            break
        tokens.append(int(token))
        cache = output.past_key_values
        step = {"inputs_embeds": model.get_input_embeddings()(token.view(1, 1))}
        if pruned.positions is not None:
            step["position_ids"] = token.new_full((3, 1, 1), position)
    return tokens


def select_rows(
    model: Any,
    processor: Any,
    prompt: str,
    *,
    keep_ratio: float,
    selector: Selector,
    images: Sequence[Any] | None = None,
    videos: Sequence[Any] | None = None,
) -> list[Tensor]:
    """Rows kept of each image and video, in the order of the prompt; see ``encode_prompt``."""
    encoded = encode_prompt(model, processor, prompt, images=images, videos=videos)
    return selector.select(visual_items(model, encoded, keep_ratio, selector.max_text_tokens))


def generate_pruned(
    model: Any,
    processor: Any,
    prompt: str,
    *,
    keep_ratio: float,
    selector: Selector,
    max_new_tokens: int,
    images: Sequence[Any] | None = None,
    videos: Sequence[Any] | None = None,
) -> list[int]:
    """Token ids that follow the pruned prompt, greedily; see ``encode_prompt``."""
    encoded = encode_prompt(model, processor, prompt, images=images, videos=videos)
    pruned = prune_prompt(model, encoded, keep_ratio=keep_ratio, selector=selector)
    return generate_greedy(model, pruned, max_new_tokens=max_new_tokens)


def _place(
    prompt_ids: list[int], media: dict[int | None, list[EncodedItem]]
) -> tuple[EncodedItem, ...]:
    """The items in the order of the prompt, each with the index of its first placeholder."""
    waiting = {token: iter(items) for token, items in media.items()}
    placed, index = [], 0
    while index < len(prompt_ids):
        item = next(waiting[prompt_ids[index]], None) if prompt_ids[index] in waiting else None
        if item is None:
            index += 1
            continue
        placed.append(EncodedItem(item.rows, item.structure_mask, item.grids, index))
        index += item.rows.shape[0]
    return tuple(placed)


def _shrunk_spans(
    prompt_ids: list[int], items: tuple[EncodedItem, ...]
) -> list[tuple[list[int], int]]:
    """Per item: the prompt with one placeholder for each, and the index after its own."""
    shrunk, ends, done = [], [], 0
    for item in items:
        shrunk += prompt_ids[done : item.start + 1]
        ends.append(len(shrunk))
        done = item.start + item.rows.shape[0]
    shrunk += prompt_ids[done:]
    return [(shrunk, end) for end in ends]


def _positions(model: Any, inputs: dict[str, Any]) -> tuple[Tensor | None, int]:
    """M-RoPE positions of the unpruned prompt, [3, L], and the one that follows them."""
    num_tokens = int(inputs["input_ids"].shape[1])
    get_rope_index = getattr(model.model, "get_rope_index", None)
    if get_rope_index is None:
        return None, num_tokens
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    positions, delta = get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        **{name: inputs[name] for name in names if name in inputs},
    )
    return positions[:, 0], num_tokens + int(delta)
