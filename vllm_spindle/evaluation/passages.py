"""Prompts of natural text, and what comes next: how a reduced cache predicts it, told every token.

Two kinds of continuation. ``natural``: the file as it goes on. ``repeated``: a passage from earlier
in the prompt, whose first tokens are said again at the prompt's end, so that what follows is there
to be looked up.

Shapes: N tokens of the continuation, V vocabulary.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_spindle.baselines.base import Method, PromptLayer
from vllm_spindle.hf import reduce_read

KINDS = ("natural", "repeated")
CUE_TOKENS = 16  # of a passage, said again at the prompt's end
CLEAR_TOKENS = 64  # between a passage and its cue, at least


@dataclass(frozen=True, slots=True)
class Passage:
    """A prompt, and what is to follow it.

    Attributes:
        prompt_ids: starts with the token that starts a text. [P].
        next_ids: [N].
        first: place in the prompt of what ``next_ids`` repeats; None if it repeats nothing.
    """

    prompt_ids: list[int]
    next_ids: list[int]
    first: int | None = None


def make_passages(
    files: Sequence[Sequence[int]],
    kind: str,
    count: int,
    *,
    prompt_tokens: tuple[int, int],
    num_next: int,
    bos: int,
    seed: int,
) -> list[Passage]:
    """Passages of as many files: no two of one seed share a file, if there are enough.

    Args:
        files: tokens of each text.
        kind: of ``KINDS``.
        count: how many.
        prompt_tokens: fewest and most tokens of a prompt.
        num_next: tokens that follow.
        bos: token that starts a text.
        seed: of the draws.

    Raises:
        ValueError: if no file is long enough.
    """
    most = prompt_tokens[1] + num_next
    long_enough = [file for file in files if len(file) > most]
    if not long_enough:
        raise ValueError(f"no file has more than {most} tokens")
    rng = random.Random(f"{kind} {seed}")
    drawn: list[Sequence[int]] = []
    while len(drawn) < count:
        drawn += rng.sample(long_enough, len(long_enough))
    found = []
    for file in drawn[:count]:
        length = rng.randint(*prompt_tokens)
        start = rng.randrange(len(file) - most)
        text = [bos, *file[start : start + most]]
        if kind == "natural":
            found.append(Passage(text[:length], text[length : length + num_next]))
            continue
        end = length - CUE_TOKENS
        cue = rng.randrange(1, end - CUE_TOKENS - num_next - CLEAR_TOKENS)
        first = cue + CUE_TOKENS
        prompt = text[:end] + text[cue:first]
        found.append(Passage(prompt, text[first : first + num_next], first))
    return found


@torch.inference_mode()
def next_log_probs(
    model: Any, passage: Passage, layers: Sequence[PromptLayer], method: Method, ratio: float
) -> tuple[Tensor, float]:
    """What a reduced prompt expects at each token of the continuation, and its share of the bytes.

    The last prompt token is taken off the cache and fed once more, now against what is left, so
    that every token is expected from the reduced cache.

    Args:
        model: one that passed ``hf.enable``.
        passage: the prompt, and what follows.
        layers: of the prompt, by ``hf.read``.
        method: that reduces them.
        ratio: share of the prompt's true bytes, (0, 1].

    Returns:
        Log-probabilities, [N, V], float32; true bytes over full ones.
    """
    cache = reduce_read(model, layers, method, ratio)
    share = (cache.true_bytes or 0) / (cache.full_bytes or 1)
    cache.crop(-1)
    unread = torch.tensor([[passage.prompt_ids[-1], *passage.next_ids[:-1]]], device=model.device)
    logits = model(unread, past_key_values=cache, use_cache=True).logits[0]
    return logits.float().log_softmax(-1), share


def divergence(full: Tensor, reduced: Tensor) -> float:
    """KL of the reduced cache's expectations to the full one's, nats a token. Both [N, V]."""
    return float((full.exp() * (full - reduced)).sum(-1).mean())


def loss(log_probs: Tensor, next_ids: Sequence[int]) -> float:
    """Nats a token of what did follow. log_probs: [N, V]."""
    return float(-log_probs.gather(1, torch.tensor(next_ids)[:, None]).mean())
