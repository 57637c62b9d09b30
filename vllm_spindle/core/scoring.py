"""Importance of each cached token, per query head, from the observation window's attention.

Shapes: K kv heads, G query heads per kv head, W window queries, T cached tokens, C context
tokens that may be evicted (C <= T), D head size. Query head ``k * G + g`` reads kv head ``k``.
Method: SpindleKV sec. 3.2, eq. 2 (arXiv:2507.06517), literally as ``paper``; the default
``pooled`` replaces the divisor by a max-pool over neighbours, as SnapKV (arXiv:2404.14469) pools:
without it the later tokens of a multi-token answer, which nothing attends to yet, are lost.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_spindle.core.ordering import ranks
from vllm_spindle.core.transfer import to_device

ScoreName = Literal["received", "pooled", "paper", "random"]

# Elements of the attention matrix that are there at a time, in torch: what a CPU's cache holds, or
# enough to keep a GPU busy.
MOST_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 26}
MIN_DISTANCE = 16  # tokens; what a token's own sentence looks at says little about later use


def window_attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Attention that the window's queries pay to each token, summed over the window.

    The window is the last W tokens; within it the causal mask holds.

    Args:
        queries: rotated queries of the last W tokens. [K, G, W, D].
        keys: rotated keys of all T tokens. [K, T, D].
        scale: softmax scale, usually D ** -0.5.

    Returns:
        Sums of W probabilities, range (0, W). [K, G, T], float32.
    """
    num_kv_heads, group, window, head_size = queries.shape
    num_tokens = keys.shape[1]
    if window > num_tokens:
        raise ValueError(f"window of {window} queries over {num_tokens} tokens")
    flat = (queries.float() * scale).reshape(num_kv_heads, group * window, head_size)
    logits = torch.bmm(flat, keys.float().transpose(1, 2))
    logits = logits.view(num_kv_heads, group, window, num_tokens)
    future = torch.ones(window, window, dtype=torch.bool, device=keys.device).triu_(1)
    logits[..., num_tokens - window :].masked_fill_(future, float("-inf"))
    return torch.softmax(logits, dim=-1).sum(dim=2)


def pooled_importance(attention: Tensor, num_context: int, *, pool_kernel: int) -> Tensor:
    """Window attention, max-pooled over ``pool_kernel`` neighbouring context tokens.

    Args:
        attention: from ``window_attention``. [K, G, T].
        num_context: tokens that may be evicted (C).
        pool_kernel: odd number of neighbours, 1 for none.

    Returns:
        [K, G, C], float32.
    """
    if pool_kernel < 1 or pool_kernel % 2 == 0:
        raise ValueError(f"pool_kernel must be odd and positive, got {pool_kernel}")
    context = attention[..., :num_context]
    return F.max_pool1d(context, pool_kernel, stride=1, padding=pool_kernel // 2)


def paper_importance(attention: Tensor, num_context: int) -> Tensor:
    """Eq. 2 as printed: the window's attention divided by l - a, position a of l tokens.

    The divisor is not the number of summed terms (that is W), so it acts as a recency prior.

    Args:
        attention: from ``window_attention``. [K, G, T].
        num_context: tokens that may be evicted (C).

    Returns:
        [K, G, C], float32.
    """
    num_tokens = attention.shape[-1]
    age = num_tokens - torch.arange(num_context, device=attention.device, dtype=attention.dtype)
    return attention[..., :num_context] / age


def random_importance(
    num_kv_heads: int, group: int, num_context: int, *, seed: int, device: torch.device | str
) -> Tensor:
    """Uniform scores: the baseline that any method must beat. [K, G, C], float32."""
    # Torch takes 64 bits; layers and prompts multiply the user's seed beyond them.
    generator = torch.Generator().manual_seed(seed % (1 << 64))
    drawn = torch.rand(num_kv_heads, group, num_context, generator=generator)
    return to_device(drawn, torch.device(device))


def received_attention(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    *,
    positions: Tensor,
    min_distance: int = 0,
    weights: Tensor | None = None,
    reduction: Literal["sum", "max"] = "sum",
) -> Tensor:
    """Attention that each token receives from Q queries, as a sum or a maximum over them.

    A prompt may come in chunks: sums of chunks add up, maxima of chunks have their maximum, as
    causal attention never sees a later chunk.

    Args:
        queries: rotated. [K, G, Q, D].
        keys: rotated keys of T tokens. [K, T, D].
        scale: softmax scale.
        positions: of the queries, ascending; on the CPU no device is waited for. At T or later all
            tokens are in their past. [Q].
        min_distance: attention over a shorter distance does not count, though it takes its part of
            the softmax.
        weights: of each query; None for 1. [Q].
        reduction: over queries.

    Returns:
        [K, G, T], float32; 0 where nothing counts.
    """
    num_kv_heads, group, num_queries, head_size = queries.shape
    num_tokens = keys.shape[1]
    transposed = keys.float().transpose(1, 2).contiguous()
    places = torch.arange(num_tokens, device=keys.device)
    received = torch.zeros(num_kv_heads, group, num_tokens, device=keys.device)
    at_once = MOST_AT_ONCE[keys.device.type] // (num_kv_heads * group * num_tokens)
    at_once = max(1, min(at_once, num_queries))
    # Two matrices for all parts: memory afresh from libc would be a third of the time.
    size = num_kv_heads * group * at_once * num_tokens
    buffers = torch.empty(2, size, device=keys.device)
    for start in range(0, num_queries, at_once):
        part = queries[:, :, start : start + at_once]
        rows = positions[start : start + at_once]
        # Nobody here sees what comes after the last of them.
        stop = min(num_tokens, int(rows[-1]) + 1)
        # Masks are slower than the rest: they cover what is near or behind the first one at least.
        near = max(0, min(stop, int(rows[0]) + 1 - min_distance))
        distance = rows.to(keys.device, non_blocking=True)[:, None] - places[near:stop]
        flat = (part.float() * scale).reshape(num_kv_heads, -1, head_size)
        shape = (*part.shape[:3], stop)
        logits, attention = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)
        torch.bmm(flat, transposed[..., :stop], out=logits.view(num_kv_heads, -1, stop))
        logits[..., near:] += torch.where(distance < 0, float("-inf"), 0.0)
        torch.softmax(logits, dim=-1, out=attention)
        if min_distance > 0:
            attention[..., near:] *= distance >= min_distance
        if weights is not None:
            attention *= weights[start : start + at_once, None]
        seen = received[..., :stop]
        if reduction == "sum":
            seen += attention.sum(dim=2)
        else:
            torch.maximum(seen, attention.amax(dim=2), out=seen)
    return received


@dataclass(frozen=True, slots=True)
class Questions:
    """What a rule asks of a prompt's observed queries: up to three maps, that take turns.

    Attributes:
        window: queries that are the last tokens up to theirs; what they pay is summed.
        last_first: the maximum over the queries from this one on, which lies in the window or
            behind it; None if nobody asks.
        from_afar: whether the maximum over all queries up to the window's last is asked, over
            ``MIN_DISTANCE`` tokens or more.
    """

    window: range
    last_first: int | None = None
    from_afar: bool = False

    @property
    def num_maps(self) -> int:
        """As many as are asked."""
        return 1 + (self.last_first is not None) + self.from_afar


class CachedKeys(Protocol):
    """Keys that are attended where they lie, by a kernel."""

    def answer(
        self, queries: Tensor, positions: Tensor, scale: float, questions: Questions
    ) -> tuple[Tensor, ...]:
        """As the function ``answer``, with ``positions`` on the keys' device."""


def answer(
    queries: Tensor, keys: Tensor, positions: Tensor, scale: float, questions: Questions
) -> tuple[Tensor, ...]:
    """Maps of attention in torch: what a CPU runs, and the slow twin of kernels.

    Args:
        queries: rotated queries of the observed tokens. [K, G, Q, D].
        keys: rotated keys of the prompt. [K, T, D].
        positions: of the queries, ascending, on the CPU. [Q], int64.
        scale: softmax scale.
        questions: what is asked.

    Returns:
        The maximum over the last queries, the window's sum, the maximum from afar: those that are
        asked. Each [K, G, T], float32.
    """

    def most(first: int, stop: int, min_distance: int = 0) -> Tensor:
        return received_attention(
            queries[:, :, first:stop],
            keys,
            scale,
            positions=positions[first:stop],
            min_distance=min_distance,
            reduction="max",
        )

    window, last_first = questions.window, questions.last_first
    summed = window_attention(queries[:, :, window.start : window.stop], keys, scale)
    maps = [] if last_first is None else [most(last_first, queries.shape[2])]
    maps.append(summed)
    if questions.from_afar:
        maps.append(most(0, window.stop, MIN_DISTANCE))
    return tuple(maps)


def in_turns(first: Tensor, second: Tensor, *, num_turns: int | None = None) -> Tensor:
    """Scores in whose order two scores take turns to choose, the first one first.

    Args:
        first: [..., C].
        second: [..., C].
        num_turns: of the first one, if it is itself made here; see ``ordering.best_first``.

    Returns:
        Minus the turn in which each is chosen, of ``2 * C`` turns. [..., C], float32.
    """
    turns = torch.minimum(2 * ranks(first, num_turns=num_turns), 2 * ranks(second) + 1)
    return -turns.float()
