"""A layer's context after eviction, merging or both, in the bytes that its band has.

The engine's steps without its blocks: the same choice, the same cover, the same roundings.
Shapes: K kv heads, C context tokens that are left, D head size.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_spindle.calibration.capture import CapturedLayer, CapturedPrompt, Context
from vllm_spindle.config import MethodName
from vllm_spindle.core.budget import BandPlan
from vllm_spindle.core.choice import ChoiceRule, choose_kept
from vllm_spindle.core.codebook import Codebook
from vllm_spindle.core.eviction import gather_kept
from vllm_spindle.core.rotary import rotate_keys, unrotate_keys
from vllm_spindle.engine.codebook_shape import codebook_shape
from vllm_spindle.kernels.numba_cover import cover_layer
from vllm_spindle.policy import SpindlePolicy


@dataclass(frozen=True)
class Reduced:
    """What is left, and what it is made of.

    Attributes:
        context: keys and values, twice [K, C, D].
        num_context: context tokens before.
        overflow: share of the merged vectors that found no entry above their threshold.
    """

    context: Context
    num_context: int
    overflow: float = 0.0


@dataclass(frozen=True)
class CoverSizes:
    """Entries that a layer's whole context needs at the thresholds, by kv head, over tokens."""

    keys: tuple[float, ...]
    values: tuple[float, ...]


def reduce_layer(
    policy: SpindlePolicy,
    method: MethodName,
    plan: BandPlan,
    prompt: CapturedPrompt,
    layer_idx: int,
) -> Reduced:
    """One layer's context in ``plan.reduced_blocks`` blocks."""
    layer = prompt.layers[layer_idx]
    num_context = plan.tail_block * policy.block_size
    num_kept = plan.reduced_blocks * policy.block_size
    everyone = torch.arange(num_context).expand(layer.keys.shape[0], -1)
    if not plan.is_reduced:
        return Reduced(_gather(layer, everyone), num_context)
    if method == "evict":
        kept = _choose(policy, prompt, layer_idx, num_context, num_kept)
        return Reduced(_gather(layer, kept), num_context)
    head_size = layer.keys.shape[-1]
    shape = codebook_shape(policy.config, method, plan, policy.block_size, head_size)
    if shape.num_tokens == 0:
        return Reduced(_gather(layer, everyone[:, :0]), num_context)
    positions = everyone
    if shape.num_tokens < num_context:
        positions = _choose(policy, prompt, layer_idx, num_context, shape.num_tokens)
    keys, values = _gather(layer, positions)
    keys = unrotate_keys(keys, positions, prompt.cos_sin)
    config = policy.config
    key_books = cover_layer(keys, config.theta_key, shape.num_key_entries)
    value_books = cover_layer(values.float(), config.theta_value, shape.num_value_entries)
    context = (
        rotate_keys(_rounded(key_books), positions, prompt.cos_sin).bfloat16(),
        _rounded(value_books),
    )
    overflow = sum(book.num_overflow for book in (*key_books, *value_books))
    return Reduced(context, num_context, overflow / (2 * positions.numel()))


def cover_sizes(policy: SpindlePolicy, prompt: CapturedPrompt, layer_idx: int) -> CoverSizes:
    """How redundant a layer is: entries over tokens with all the room there is."""
    layer = prompt.layers[layer_idx]
    positions = torch.arange(prompt.prompt_len)
    keys = unrotate_keys(layer.keys[:, : prompt.prompt_len], positions, prompt.cos_sin)
    values = layer.values[:, : prompt.prompt_len].float()
    config = policy.config
    return CoverSizes(
        keys=_shares(cover_layer(keys, config.theta_key, None)),
        values=_shares(cover_layer(values, config.theta_value, None)),
    )


def _shares(books: Iterable[Codebook]) -> tuple[float, ...]:
    return tuple(len(book.entries) / len(book.codes) for book in books)


def _choose(
    policy: SpindlePolicy,
    prompt: CapturedPrompt,
    layer_idx: int,
    num_context: int,
    num_kept: int,
) -> Tensor:
    layer, config = prompt.layers[layer_idx], policy.config
    return choose_kept(
        ChoiceRule(config.score, config.pool_kernel, config.gqa, config.seed),
        layer.queries[:, :, : -len(prompt.answer)],
        layer.keys[:, : prompt.prompt_len],
        scale=layer.scale,
        num_context=num_context,
        num_kept=num_kept,
    )


def _gather(layer: CapturedLayer, positions: Tensor) -> Context:
    return gather_kept(layer.keys, positions), gather_kept(layer.values, positions)


def _rounded(books: Iterable[Codebook]) -> Tensor:
    """The vectors as a region gives them back: entries in bf16, norms in fp16. [K, C, D]."""
    return torch.stack(
        [
            book.entries.bfloat16().float()[book.codes] * book.norms.half().float()[:, None]
            for book in books
        ]
    )
