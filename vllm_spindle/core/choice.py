"""From a layer's observed queries and keys to the tokens it keeps: scoring, then selection.

The one entry that the engine, the transformers cache and the tests share, so that they keep the
same tokens. Shapes: K kv heads, G query heads per kv head, Q observed queries, the window's W last
among them, T prompt tokens, N tokens to keep, D head size.

Behind the window may come the answer's first tokens, if the prompt was reduced after them
(``reduce_after``): what they look at is what the answer needs. Decoded ahead to choose by, as in
Lookahead Q-Cache (arXiv:2505.20334).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_spindle.core.eviction import GqaName, rank_tokens
from vllm_spindle.core.modality import VisualCap, cap_visual, max_visual_tokens
from vllm_spindle.core.ordering import ascending
from vllm_spindle.core.scoring import (
    CachedKeys,
    Questions,
    ScoreName,
    answer,
    in_turns,
    paper_importance,
    pooled_importance,
    random_importance,
)
from vllm_spindle.core.transfer import to_device

Maps = tuple[Tensor, ...]
# Scores of tokens for query heads ranked on a device in one go: 32 layers of 32 heads at 4k tokens.
# More would take more memory, and a long prompt's layer fills a device alone.
RANKED_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class ChoiceRule:
    """How a layer chooses.

    ``seed`` serves only the random baseline, ``window`` counts tokens, ``last_query`` gives the
    last of them a turn of its own under ``received``.
    """

    score: ScoreName
    pool_kernel: int
    gqa: GqaName
    seed: int = 0
    window: int = 32
    last_query: bool = True


def choose_kept(
    rule: ChoiceRule,
    queries: Tensor,
    keys: Tensor | CachedKeys,
    positions: Tensor,
    *,
    scale: float,
    num_context: int,
    num_kept: int,
    num_protected: int = 0,
    num_ahead: int = 0,
    visual: VisualCap | None = None,
) -> Tensor:
    """Positions of the context tokens to keep, ascending; see ``rank_context``."""
    ranked = rank_context(
        rule,
        queries,
        keys,
        positions,
        scale=scale,
        num_context=num_context,
        num_kept=num_kept,
        num_protected=num_protected,
        num_ahead=num_ahead,
        visual=visual,
    )
    return _in_order(ranked, num_context)


def rank_context(
    rule: ChoiceRule,
    queries: Tensor,
    keys: Tensor | CachedKeys,
    positions: Tensor,
    *,
    scale: float,
    num_context: int,
    num_kept: int,
    num_protected: int = 0,
    num_ahead: int = 0,
    visual: VisualCap | None = None,
) -> Tensor:
    """Positions of the context tokens to keep, the most important first.

    Args:
        rule: scoring and GQA rule.
        queries: rotated queries of the observed tokens. [K, G, Q, D].
        keys: rotated keys of the whole prompt, [K, T, D]; or what attends to them in the cache.
        positions: of the observed tokens, ascending, the window last (``core/observers.py``), and
            behind it only what is ahead; on the CPU for a tensor of keys. [Q], int64.
        scale: softmax scale.
        num_context: tokens that may be evicted lie below this position.
        num_kept: context tokens to keep; per query head with ``unfold``.
        num_protected: and from this position on; those before are kept anyway.
        num_ahead: last of the observed queries, which are those of the answer's first tokens.
        visual: keep fewer visual tokens than the scores ask for; None for no difference.

    Returns:
        int64: [K, N], with ``unfold`` [K, G, N].
    """
    maps = attention_maps(
        rule,
        queries,
        keys,
        positions,
        scale=scale,
        num_context=num_context,
        num_ahead=num_ahead,
    )
    return rank_maps(rule, maps, num_kept=num_kept, num_protected=num_protected, visual=visual)


def attention_maps(
    rule: ChoiceRule,
    queries: Tensor,
    keys: Tensor | CachedKeys,
    positions: Tensor,
    *,
    scale: float,
    num_context: int,
    num_ahead: int = 0,
) -> Maps:
    """What a rule asks of one layer, to be ranked with other layers' or alone.

    Args:
        rule: and the others as for ``rank_context``.

    Returns:
        Maps of the context, the one first whose turn comes first. Each [K, G, C], float32.
    """
    if rule.score == "random":
        num_kv_heads, group = queries.shape[:2]
        return (
            random_importance(
                num_kv_heads, group, num_context, seed=rule.seed, device=queries.device
            ),
        )
    num_queries = queries.shape[2]
    num_asking = num_queries - num_ahead
    # A sum over the window drowns what the queries that answer look at next.
    last = num_asking - (1 if rule.last_query and rule.score == "received" else 0)
    questions = Questions(
        window=range(max(0, num_asking - rule.window), num_asking),
        last_first=last if last < num_queries and rule.score != "paper" else None,
        from_afar=rule.score == "received",
    )
    if isinstance(keys, Tensor):
        maps = answer(queries, keys, positions, scale, questions)
    else:
        maps = keys.answer(queries, positions, scale, questions)
    if rule.score == "paper":
        return (paper_importance(maps[0], num_context),)
    return tuple(each[..., :num_context] for each in maps)


def stack_maps(layers: Sequence[Maps]) -> Maps:
    """Layers' maps as if they were one's, of L times K heads: ranked in one go, heads as before.

    A layer's dozens of small launches on a GPU are so all layers'.
    """
    if len(layers) == 1:
        return layers[0]
    return tuple(torch.cat(each) for each in zip(*layers, strict=True))


def layers_at_once(num_heads: int, num_tokens: int) -> int:
    """Layers whose maps a device ranks in one go: of short prompts all, of long ones one.

    Args:
        num_heads: query heads of a layer.
        num_tokens: T.
    """
    return max(1, RANKED_AT_ONCE // (num_heads * num_tokens))


def choose_by_maps(
    rule: ChoiceRule,
    maps: Maps,
    *,
    num_kept: int,
    num_protected: int = 0,
    visual: VisualCap | None = None,
) -> Tensor:
    """Positions to keep, ascending; see ``rank_maps``."""
    ranked = rank_maps(rule, maps, num_kept=num_kept, num_protected=num_protected, visual=visual)
    return _in_order(ranked, maps[0].shape[-1])


def rank_maps(
    rule: ChoiceRule,
    maps: Maps,
    *,
    num_kept: int,
    num_protected: int = 0,
    visual: VisualCap | None = None,
) -> Tensor:
    """Positions to keep, the most important first, by turns if there is more than one map.

    Args:
        rule: whose seed is spent.
        maps: from ``attention_maps``, of one layer or stacked. Each [K, G, C].
        num_kept: and the others as for ``rank_context``.

    Returns:
        int64: [K, N], with ``unfold`` [K, G, N].
    """
    scores, num_turns = _pooled(rule, maps[0]), None
    for each in maps[1:]:
        scores = in_turns(scores, _pooled(rule, each), num_turns=num_turns)
        num_turns = 2 * scores.shape[-1]
    candidates = scores[..., num_protected:]
    return num_protected + _rank(candidates, num_turns, num_kept, rule.gqa, visual, num_protected)


def keep_by_head(ranked: Tensor, counts: Sequence[int], num_context: int) -> list[Tensor]:
    """Positions that each kv head keeps, ascending, where heads keep different numbers.

    Args:
        ranked: best first. [K, at least the most].
        counts: of each head. [K].
        num_context: all positions lie below.
    """
    return list(torch.split(ascending(ranked, counts, num_context), list(counts)))


def _in_order(ranked: Tensor, num_context: int) -> Tensor:
    rows = ranked.flatten(0, -2)
    return ascending(rows, [rows.shape[1]] * len(rows), num_context).view(ranked.shape)


def _pooled(rule: ChoiceRule, attention: Tensor) -> Tensor:
    if rule.score not in ("pooled", "received"):
        return attention
    return pooled_importance(attention, attention.shape[-1], pool_kernel=rule.pool_kernel)


def _rank(
    scores: Tensor,
    num_turns: int | None,
    num_kept: int,
    gqa: GqaName,
    visual: VisualCap | None,
    first: int,
) -> Tensor:
    """Candidates by rank, counted from ``first`` on. scores: [K, G, candidates]."""
    if visual is None:
        return rank_tokens(scores, num_kept, gqa, num_turns=num_turns)
    num_candidates = scores.shape[-1]
    is_visual = visual.mask[first : first + num_candidates]
    # Counted on the CPU, where the mask is: no device is waited for.
    most = max_visual_tokens(num_kept, int(is_visual.sum()), num_candidates, visual.share)
    ranked = rank_tokens(scores, num_candidates, gqa, num_turns=num_turns)
    is_visual = to_device(is_visual, ranked.device)
    return cap_visual(ranked, is_visual, most)[..., :num_kept]
