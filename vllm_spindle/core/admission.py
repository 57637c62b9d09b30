"""Which tokens a codebook of limited capacity takes in: by rank, as long as they fit.

A token is merged where its key and its value each find an entry above the threshold; where there
is neither one nor room for one, it is dropped, and the next in rank has its turn. So nothing is
stored that is wrong by more than the thresholds allow, and what does not fit is what the prompt's
end attends to least. Shapes: N tokens, best first, D head size.
Method: SpindleKV sec. 3.3 (arXiv:2507.06517). Differs from the paper, which has no capacity.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_spindle.core.codebook import Book, Codebook

CHUNK = 128
"""Tokens covered together. More share entries better, fewer keep closer to the rank: what of the
last chunk fits is decided by the number of its neighbours."""
MATCHED = 1024  # tokens that are matched at a time: the table of their products stays small


@dataclass(frozen=True, slots=True)
class Admitted:
    """Tokens of one kv head that are in.

    Attributes:
        tokens: their indices, ascending. [n], int64.
        keys: their keys' codebook.
        values: their values'.
        num_refused: tokens passed over for want of an entry.
    """

    tokens: Tensor
    keys: Codebook
    values: Codebook
    num_refused: int


def admit(
    keys: Tensor,
    values: Tensor,
    ranked: Tensor,
    thresholds: tuple[float, float],
    capacity: tuple[int, int, int],
    book: type[Book] = Book,
    chunk: int = CHUNK,
) -> Admitted:
    """Take tokens in, best first.

    Args:
        keys: without rotation. [T, D].
        values: [T, D].
        ranked: indices of tokens, the most important first. [N], int64.
        thresholds: for keys and for values.
        capacity: key entries, value entries and tokens that there is room for, each at least 1.
        book: who builds the tables.
        chunk: tokens at a time.
    """
    key_book = book(keys[ranked], thresholds[0], capacity[0])
    value_book = book(values[ranked], thresholds[1], capacity[1])
    taken: list[Tensor] = []
    room, rest = capacity[2], torch.arange(len(ranked), device=ranked.device)
    while room and len(rest):
        # Nothing is covered any more once the keys are full: each of them is matched for itself.
        size = chunk if key_book.has_room else MATCHED
        part, rest = rest[:size], rest[size:]
        for fitting in torch.split(key_book.add(part), chunk):
            taken.append(value_book.add(fitting)[:room])
            room -= len(taken[-1])
    inside = torch.cat(taken) if taken else ranked[:0]
    num_seen = len(ranked) if room else int(inside[-1]) + 1
    tokens, order = ranked[inside].sort()
    inside = inside[order]
    return Admitted(
        tokens, key_book.codebook(inside), value_book.codebook(inside), num_seen - len(inside)
    )
