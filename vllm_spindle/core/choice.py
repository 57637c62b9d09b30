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

from torch import Tensor

from vllm_spindle.core.eviction import GqaName, rank_tokens
from vllm_spindle.core.modality import VisualCap, cap_visual, max_visual_tokens
from vllm_spindle.core.scoring import (
    MIN_DISTANCE,
    Attention,
    CachedKeys,
    ScoreName,
    TorchAttention,
    in_turns,
    paper_importance,
    pooled_importance,
    random_importance,
)


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
    return ranked.sort(dim=-1).values


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
    scores, num_turns = _importance(rule, queries, keys, positions, scale, num_context, num_ahead)
    candidates = scores[..., num_protected:]
    return num_protected + _rank(candidates, num_turns, num_kept, rule.gqa, visual, num_protected)


def keep_by_head(ranked: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Positions that each kv head keeps, ascending, where heads keep different numbers.

    Args:
        ranked: best first. [K, at least the most].
        counts: of each head. [K].
    """
    return [head[:count].sort().values for head, count in zip(ranked, counts, strict=True)]


def _importance(
    rule: ChoiceRule,
    queries: Tensor,
    keys: Tensor | CachedKeys,
    positions: Tensor,
    scale: float,
    num_context: int,
    num_ahead: int,
) -> tuple[Tensor, int | None]:
    """Scores of the context per query head, [K, G, C], float32; of how many turns, if they are."""
    if rule.score == "random":
        num_kv_heads, group = queries.shape[:2]
        drawn = random_importance(
            num_kv_heads, group, num_context, seed=rule.seed, device=queries.device
        )
        return drawn, None
    num_asking = len(positions) - num_ahead

    def pooled(attention: Tensor) -> Tensor:
        return pooled_importance(attention, num_context, pool_kernel=rule.pool_kernel)

    if isinstance(keys, Tensor):
        attention: Attention = TorchAttention(queries, keys, positions, scale)
    else:
        attention = keys.attend(queries, positions, scale)
    summed = attention.window(max(0, num_asking - rule.window), num_asking)
    if rule.score == "paper":
        return paper_importance(summed, num_context), None
    asked, num_turns = pooled(summed), None
    first = num_asking - (1 if rule.last_query and rule.score == "received" else 0)
    num_queries = queries.shape[2]
    if first < num_queries:
        # A sum over the window drowns what the queries that answer look at next.
        asked = in_turns(pooled(attention.most(first, num_queries)), asked)
        num_turns = 2 * num_context
    if rule.score == "pooled":
        return asked, num_turns
    received = attention.most(0, num_asking, min_distance=MIN_DISTANCE)
    return in_turns(asked, pooled(received), num_turns=num_turns), 2 * num_context


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
    is_visual = is_visual.to(ranked.device, non_blocking=True)
    return cap_visual(ranked, is_visual, most)[..., :num_kept]
