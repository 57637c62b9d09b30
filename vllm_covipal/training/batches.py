"""Rows for the frozen LVLM, made of encoded samples.

Shapes: B rows, T tokens of the longest row, D width, L tokens of one question's sequence.

A row is one question, or one picture and all questions about it: without pruning the picture's
part is the same for all, so it runs once. A mask lets a question see the picture and itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_covipal.training.encode import EncodedSample, Sequenced


@dataclass(frozen=True, slots=True)
class Question:
    """One sequence's place in a batch.

    Attributes:
        sample: its pictures.
        sequence: its tokens.
        row: of the batch.
        tokens: index in the row of each of its tokens. [L].
    """

    sample: EncodedSample
    sequence: Sequenced
    row: int
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows, padded on the right.

    Attributes:
        embeddings: [B, T, D].
        positions: [B, T], or [3, B, T] under M-RoPE.
        allowed: True where a query may see a key. [B, 1, T, T].
        questions: in the order of the samples.
    """

    embeddings: Tensor
    positions: Tensor
    allowed: Tensor
    questions: tuple[Question, ...]


@torch.no_grad()
def make_batch(model: Any, samples: Sequence[EncodedSample], *, share_pictures: bool) -> Batch:
    """One row per picture where ``share_pictures`` and the prompts allow it, else per question."""
    rows: list[tuple[EncodedSample, list[Sequenced], int]] = []
    for sample in samples:
        shared = _shared_length(sample) if share_pictures else 0
        if shared:
            rows.append((sample, list(sample.sequences), shared))
        else:
            rows += [(sample, [sequence], 0) for sequence in sample.sequences]
    embed = model.get_input_embeddings()
    built = [_row(embed, number, *row) for number, row in enumerate(rows)]
    num_tokens = max(len(segments) for _, _, segments, _ in built)
    embeddings = torch.stack([_padded(e, num_tokens, 0) for e, _, _, _ in built])
    positions = torch.stack([_padded(p.movedim(-1, 0), num_tokens, -1) for _, p, _, _ in built])
    if positions.dim() == 3:  # [B, T, 3] -> [3, B, T]
        positions = positions.permute(2, 0, 1)
    segments = torch.stack(
        [torch.nn.functional.pad(s, (0, num_tokens - len(s)), value=-1) for _, _, s, _ in built]
    )
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=segments.device).tril()
    query, key = segments[:, :, None], segments[:, None, :]
    allowed = causal & ((query == key) | (key == 0))
    questions = tuple(question for _, _, _, of_row in built for question in of_row)
    return Batch(embeddings, positions, allowed[:, None], questions)


def _shared_length(sample: EncodedSample) -> int:
    """Tokens up to the last picture's end, if all questions have the same; else 0."""
    first = sample.sequences[0]
    end = first.media_end
    same = all(
        other.media_end == end
        and torch.equal(other.ids[:end], first.ids[:end])
        and torch.equal(other.positions[..., :end], first.positions[..., :end])
        for other in sample.sequences
    )
    return end if same else 0


def _row(
    embed: Any, number: int, sample: EncodedSample, sequences: list[Sequenced], shared: int
) -> tuple[Tensor, Tensor, Tensor, list[Question]]:
    first = sequences[0]
    ids = torch.cat([first.ids[:shared], *(s.ids[shared:] for s in sequences)])
    positions = torch.cat(
        [first.positions[..., :shared], *(s.positions[..., shared:] for s in sequences)], dim=-1
    )
    embeddings = embed(ids).clone()
    segments = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    questions, start = [], shared
    prefix = torch.arange(shared, device=ids.device)
    for i, sequence in enumerate(sequences, start=1):
        end = start + len(sequence.ids) - shared
        segments[start:end] = i
        own = torch.arange(start, end, device=ids.device)
        questions.append(Question(sample, sequence, number, torch.cat([prefix, own])))
        start = end
    for item, begin in zip(sample.items, first.starts, strict=True):
        embeddings[begin : begin + len(item.rows)] = item.rows.to(embeddings.dtype)
    return embeddings, positions, segments, questions


def _padded(rows: Tensor, num_rows: int, value: int) -> Tensor:
    """More rows at the end; padding's positions repeat the last one when ``value`` is -1."""
    missing = num_rows - rows.shape[0]
    if not missing:
        return rows
    fill = rows[-1:] if value == -1 else torch.zeros_like(rows[-1:])
    return torch.cat([rows, fill.expand(missing, *rows.shape[1:])])


@dataclass(frozen=True, slots=True)
class Shortened:
    """A batch without the tokens that left, rows padded on the right again. T' tokens.

    Attributes:
        embeddings: [B, T', D].
        positions: [B, T'] or [3, B, T'].
        allowed: [B, 1, T', T'].
        key_bias: [B, T'].
        place: index of each token among those that stay; of no meaning for the others. [B, T].
    """

    embeddings: Tensor
    positions: Tensor
    allowed: Tensor
    key_bias: Tensor
    place: Tensor


def without_tokens(batch: Batch, positions: Tensor, key_bias: Tensor, left: Tensor) -> Shortened:
    """The batch without some keys: time and memory of a pruned prompt, not of the whole one.

    Args:
        batch: rows.
        positions: of their tokens. [B, T] or [3, B, T].
        key_bias: [B, T].
        left: True for tokens that are gone. [B, T].
    """
    counts = (~left).sum(1)
    order = left.to(torch.int8).argsort(dim=1, stable=True)[:, : int(counts.max())]
    is_real = torch.arange(order.shape[1], device=order.device) < counts[:, None]
    rows = torch.arange(len(order), device=order.device)[:, None]
    allowed = batch.allowed[rows[:, :, None], 0, order[:, :, None], order[:, None, :]]
    return Shortened(
        batch.embeddings[rows, order],
        positions[..., rows, order],
        (allowed & is_real[:, None, :])[:, None],
        key_bias[rows, order],
        (~left).cumsum(1) - 1,
    )
