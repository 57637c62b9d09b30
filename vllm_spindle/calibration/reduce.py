"""A layer's context after eviction, merging or both, in the bytes that its band has.

The engine's steps without its blocks: the same choice, the same cover, the same roundings. For
calibration and for the transformers cache.
Shapes: K kv heads, C context tokens that are left, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vllm_spindle.baselines.base import PromptLayer
from vllm_spindle.calibration.capture import CapturedPrompt, Context
from vllm_spindle.choice_rule import choice_rule
from vllm_spindle.config import MethodName
from vllm_spindle.core.admission import Admitted
from vllm_spindle.core.budget import BandPlan
from vllm_spindle.core.choice import keep_by_head, rank_context
from vllm_spindle.core.codebook import Codebook, ScopeName, cover_heads
from vllm_spindle.core.eviction import gather_kept
from vllm_spindle.core.rotary import rotate_keys, unrotate_keys
from vllm_spindle.engine.codebook_shape import codebook_shape
from vllm_spindle.kernels.cover import WINDOW, CompiledBook, admit_layer
from vllm_spindle.kernels.host_scoring import host_keys
from vllm_spindle.policy import SpindlePolicy


@dataclass(frozen=True)
class Reduced:
    """What is left, and what it is made of.

    Attributes:
        context: keys, values, and which of them are there.
        num_context: context tokens before.
        positions: where the tokens stood. [K, C], int64.
        overflow: share of the context tokens turned away for want of an entry.
    """

    context: Context
    num_context: int
    positions: Tensor
    overflow: float = 0.0


@dataclass(frozen=True)
class CoverSizes:
    """Entries that a layer's whole prompt needs at the thresholds, over its keys or values.

    Attributes:
        keys, values: a table per kv head, by head.
        layer_keys, layer_values: one table for all kv heads.
    """

    keys: tuple[float, ...]
    values: tuple[float, ...]
    layer_keys: float
    layer_values: float


def reduce_layer(
    policy: SpindlePolicy,
    method: MethodName,
    plan: BandPlan,
    prompt: CapturedPrompt,
    layer_idx: int,
) -> Reduced:
    """One captured layer's context in ``plan.reduced_blocks`` blocks."""
    captured = prompt.layers[layer_idx]
    layer = PromptLayer(
        queries=captured.queries[:, :, : -len(prompt.answer)],
        keys=captured.keys[:, : prompt.prompt_len],
        values=captured.values[:, : prompt.prompt_len],
        scale=captured.scale,
        layer_idx=layer_idx,
        cos_sin=prompt.cos_sin,
    )
    return reduce_prompt(policy, method, plan, layer, policy.config.seed)


def reduce_prompt(
    policy: SpindlePolicy, method: MethodName, plan: BandPlan, layer: PromptLayer, seed: int
) -> Reduced:
    """One layer's context in ``plan.reduced_blocks`` blocks, behind a protected prefix if any.

    Args:
        seed: of the random score.

    Raises:
        ValueError: if a codebook is to merge keys that no plain rotation turned.
    """
    num_context = plan.tail_block * policy.block_size
    num_protected = plan.prefix_blocks * policy.block_size
    if not plan.is_reduced:
        everything = torch.arange(num_context).expand(layer.keys.shape[0], -1)
        context = dense(layer.keys[:, :num_context], layer.values[:, :num_context])
        return Reduced(context, num_context, everything)
    config = policy.config
    rule = choice_rule(config, seed=seed)
    queries, positions = _observed(policy, plan, layer)
    # As the engine scores them, where both come from it.
    keys = host_keys(layer.keys) if queries.dtype == layer.keys.dtype else layer.keys

    def rank(num_kept: int) -> Tensor:
        return rank_context(
            rule,
            queries,
            keys,
            positions,
            scale=layer.scale,
            num_context=num_context,
            num_kept=num_kept,
            num_protected=num_protected,
            num_ahead=0 if layer.ahead is None else layer.ahead.shape[2],
        )

    if policy.profile is not None:
        counts = policy.head_blocks(layer.layer_idx, plan, range(layer.keys.shape[0]))
        ranked = rank(max(counts) * policy.block_size)
        return _by_head(layer, num_context, num_protected, ranked, counts, policy.block_size)
    if method == "evict":
        kept = _sorted(rank(plan.reduced_blocks * policy.block_size // _num_copies(policy)))
        heads = torch.arange(layer.keys.shape[0])
        heads = heads if kept.dim() == 2 else heads.repeat_interleave(kept.shape[1])
        kept = kept.view(len(heads), -1)
        kept = torch.cat([torch.arange(num_protected).expand(len(heads), -1), kept], dim=1)
        context = dense(
            gather_kept(layer.keys[heads], kept), gather_kept(layer.values[heads], kept)
        )
        return Reduced(context, num_context, kept)
    head_size = layer.keys.shape[-1]
    shape = codebook_shape(config, method, plan, policy.block_size, head_size)
    prefix = dense(layer.keys[:, :num_protected], layer.values[:, :num_protected])
    prefix_positions = torch.arange(num_protected).expand(layer.keys.shape[0], -1)
    if shape.num_tokens == 0:
        return Reduced(prefix, num_context, prefix_positions)
    if layer.cos_sin is None:
        raise ValueError(f"method {method!r}: the keys are not turned by a plain rotation")
    heads = admit_layer(
        unrotate_keys(layer.keys[:, :num_context], torch.arange(num_context), layer.cos_sin),
        layer.values[:, :num_context],
        rank(num_context - num_protected),
        (config.theta_key, config.theta_value),
        (shape.num_key_entries, shape.num_value_entries, shape.num_tokens),
    )
    num_refused = sum(head.num_refused for head in heads)
    overflow = num_refused / (len(heads) * (num_context - num_protected))
    positions = pad_sequence([head.tokens for head in heads], batch_first=True)
    merged = zip(prefix, _context(heads, layer.cos_sin), strict=True)
    keys, values, is_there = (torch.cat([before, after], dim=1) for before, after in merged)
    positions = torch.cat([prefix_positions, positions], dim=1)
    return Reduced((keys, values, is_there), num_context, positions, overflow)


def _observed(policy: SpindlePolicy, plan: BandPlan, layer: PromptLayer) -> tuple[Tensor, Tensor]:
    """Queries that score, [K, G, Q, D], and their positions, [Q]."""
    if layer.repeated is not None:
        return layer.repeated, layer.num_tokens + torch.arange(layer.repeated.shape[2])
    positions = torch.from_numpy(policy.observed(layer.num_tokens, [plan]))
    # A captured prompt has the queries of its last tokens alone.
    rows = positions - (layer.num_tokens - layer.queries.shape[2])
    queries = layer.queries[:, :, rows]
    if layer.ahead is None:
        return queries, positions
    ahead = layer.num_tokens + torch.arange(layer.ahead.shape[2])
    return torch.cat([queries, layer.ahead], dim=2), torch.cat([positions, ahead])


def _by_head(
    layer: PromptLayer,
    num_context: int,
    num_protected: int,
    ranked: Tensor,
    counts: Sequence[int],
    block_size: int,
) -> Reduced:
    """Each kv head in blocks of its own. ranked: positions, best first, [K, most tokens]."""
    prefix = torch.arange(num_protected)
    kept = keep_by_head(ranked.cpu(), [count * block_size for count in counts], num_context)
    kept = [torch.cat([prefix, each]) for each in kept]
    lengths = torch.tensor([len(each) for each in kept])
    positions = pad_sequence(kept, batch_first=True).to(layer.keys.device)
    is_there = torch.arange(positions.shape[1]) < lengths[:, None]
    context = (
        gather_kept(layer.keys, positions),
        gather_kept(layer.values, positions),
        is_there.to(layer.keys.device),
    )
    return Reduced(context, num_context, positions)


def dense(keys: Tensor, values: Tensor) -> Context:
    """A context that all kv heads have. Twice [K, C, D]."""
    return keys, values, torch.ones(keys.shape[:2], dtype=torch.bool)


def cover_sizes(policy: SpindlePolicy, prompt: CapturedPrompt, layer_idx: int) -> CoverSizes:
    """How redundant a layer is: entries over tokens with all the room there is."""
    layer = prompt.layers[layer_idx]
    positions = torch.arange(prompt.prompt_len)
    keys = unrotate_keys(layer.keys[:, : prompt.prompt_len], positions, prompt.cos_sin)
    values = layer.values[:, : prompt.prompt_len].float()
    theta_key, theta_value = policy.config.theta_key, policy.config.theta_value
    return CoverSizes(
        keys=_shares(keys, "head", theta_key),
        values=_shares(values, "head", theta_value),
        layer_keys=_shares(keys, "layer", theta_key)[0],
        layer_values=_shares(values, "layer", theta_value)[0],
    )


def _shares(vectors: Tensor, scope: ScopeName, threshold: float) -> tuple[float, ...]:
    num_heads = vectors.shape[0] if scope == "layer" else 1  # that share a table
    window = WINDOW // num_heads
    books = cover_heads(vectors, scope, threshold, window, CompiledBook)
    return tuple(len(book.entries) / len(book.codes) for book in books)


def _num_copies(policy: SpindlePolicy) -> int:
    return policy.num_queries_per_kv if policy.config.gqa == "unfold" else 1


def _sorted(positions: Tensor) -> Tensor:
    return positions.sort(dim=-1).values


def _context(heads: Sequence[Admitted], cos_sin: Tensor) -> Context:
    """Merged tokens as a region gives them back: entries in bf16, norms in fp16."""
    keys = [rotate_keys(_rounded(head.keys), head.tokens, cos_sin).bfloat16() for head in heads]
    lengths = torch.tensor([len(head.tokens) for head in heads])
    return (
        pad_sequence(keys, batch_first=True),
        pad_sequence([_rounded(head.values) for head in heads], batch_first=True),
        torch.arange(int(lengths.max())) < lengths[:, None],
    )


def _rounded(book: Codebook) -> Tensor:
    return book.entries.bfloat16().float()[book.codes] * book.norms.half().float()[:, None]
