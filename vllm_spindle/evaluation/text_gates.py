"""Whether a text model is a yardstick: it must use its context, and lose by random eviction.

A model that predicts from the last few tokens alone makes every method tie.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_spindle.baselines import make_method
from vllm_spindle.evaluation.passages import Passage, divergence, loss, next_log_probs
from vllm_spindle.hf import enable, read

SHORT_TOKENS = 64
RANDOM_RATIO = 0.25


@dataclass(frozen=True, slots=True)
class Gates:
    """Nats a token, each a value a passage.

    Attributes:
        long: loss of natural continuations after the whole prompt.
        short: after its last ``SHORT_TOKENS`` alone.
        first: loss of passages where the prompt says them first.
        second: where they are repeated behind the prompt.
        random: loss of the natural and then the repeated continuations after random eviction.
        random_divergence: KL of the same.
    """

    long: list[float]
    short: list[float]
    first: list[float]
    second: list[float]
    random: list[float]
    random_divergence: list[float]


def measure_gates(model: Any, natural: Sequence[Passage], repeated: Sequence[Passage]) -> Gates:
    """All of them. model: a causal language model of transformers, which passes ``hf.enable``."""
    enable(model)
    whole, lot = make_method("full"), make_method("random")
    gates = Gates([], [], [], [], [], [])
    for passage in (*natural, *repeated):
        prompt = torch.tensor([passage.prompt_ids], device=model.device)
        layers = read(model, prompt)
        full, _ = next_log_probs(model, passage, layers, whole, 1.0)
        left, _ = next_log_probs(model, passage, layers, lot, RANDOM_RATIO)
        after = loss(full, passage.next_ids)
        gates.random.append(loss(left, passage.next_ids))
        gates.random_divergence.append(divergence(full, left))
        if passage.first is None:
            gates.long.append(after)
            gates.short.append(_plain_loss(model, _shortened(passage)))
        else:
            gates.second.append(after)
            said = passage.prompt_ids[: passage.first]
            gates.first.append(_plain_loss(model, Passage(said, passage.next_ids)))
    return gates


def _shortened(passage: Passage) -> Passage:
    """The same continuation after the prompt's last tokens, behind the token that starts a text."""
    start, *rest = passage.prompt_ids
    return Passage([start, *rest[-SHORT_TOKENS:]], passage.next_ids)


@torch.inference_mode()
def _plain_loss(model: Any, passage: Passage) -> float:
    ids = [*passage.prompt_ids, *passage.next_ids[:-1]]
    logits: Tensor = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    return loss(logits[-len(passage.next_ids) :].float().log_softmax(-1), passage.next_ids)
