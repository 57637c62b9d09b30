"""What a step of either stage computes: scores of the module, targets of the LVLM, one loss.

Shapes: C candidates of an item.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_covipal.core.budget import kept_tokens
from vllm_covipal.core.labels import label_rows, received_attention, scaled_labels
from vllm_covipal.core.losses import budget_loss
from vllm_covipal.core.soft_mask import (
    RETENTION_FLOOR,
    budgeted_retention,
    compact_positions,
    retention_bias,
    sigmoid_retention,
    straight_through_bias,
)
from vllm_covipal.selectors.base import top_places
from vllm_covipal.training.batches import Batch, Question, make_batch, without_tokens
from vllm_covipal.training.encode import EncodedSample
from vllm_covipal.training.lvlm import answer_logits, biased_mask, guide_attention
from vllm_covipal.training.recipe import Stage1Recipe, Stage2Recipe

LEFT_BIAS = math.log(RETENTION_FLOOR) + 1e-3
"""A key with no more than this is not computed with: it has no attention and gets no gradient."""

Scorer = Callable[[list[Tensor], list[Tensor]], Tensor]
"""The module, perhaps wrapped by accelerate: candidates and texts -> scores of all. [sum of C]."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A step's loss, and what the curves show beside it."""

    loss: Tensor
    shown: dict[str, float]


@dataclass(frozen=True, slots=True)
class Scored:
    """One picture of one question, and the module's scores of it.

    Attributes:
        question: whose picture it is.
        columns: the candidates' places in the question's sequence. [C].
        scores: [C].
    """

    question: Question
    columns: Tensor
    scores: Tensor


def score_batch(model: Any, scorer: Scorer, batch: Batch) -> list[Scored]:
    """Every question's pictures, scored. The module gets candidates and prompt text only."""
    embed = model.get_input_embeddings()
    visual, text, found = [], [], []
    for question in batch.questions:
        sequence = question.sequence
        for item, start, ids in zip(
            question.sample.items, sequence.starts, sequence.text_ids, strict=True
        ):
            mask = item.structure_mask
            rows = torch.arange(len(item.rows), device=item.rows.device)
            rows = rows if mask is None else rows[~mask]
            visual.append(item.rows[rows].detach())
            with torch.no_grad():
                text.append(embed(torch.tensor(ids, dtype=torch.int64, device=rows.device)))
            found.append((question, start + rows))
    scores = scorer(visual, text).float().split([len(columns) for _, columns in found])
    return [Scored(q, columns, s) for (q, columns), s in zip(found, scores, strict=True)]


def label_loss(
    model: Any, batch: Batch, scored: Sequence[Scored], recipe: Stage1Recipe, layer_idx: int
) -> Outcome:
    """Stage 1: squared error between scores and the guide layer's attention, mean of items."""
    guide = guide_attention(model, batch.embeddings, batch.positions, batch.allowed, layer_idx)
    losses, overlaps = [], []
    for one in scored:
        question = one.question
        target = guide_labels(guide, question, one.columns, recipe)
        losses.append(F.mse_loss(one.scores, target))
        overlaps.append(_overlap(one.scores, target, max(1, len(target) // 10)))
    loss = torch.stack(losses).mean()
    return Outcome(loss, {"mse": float(loss.detach()), "top_tenth_overlap": _mean(overlaps)})


def guide_labels(guide: Any, question: Question, columns: Tensor, recipe: Stage1Recipe) -> Tensor:
    """The target of one item. [C]."""
    sequence, tokens = question.sequence, question.tokens
    rows = label_rows(
        recipe.rows,
        num_tokens=len(sequence.ids),
        num_visual=sum(len(item.rows) for item in question.sample.items),
        media_end=sequence.media_end,
        num_prompt=sequence.num_prompt,
    )
    queries = guide.queries[question.row][:, tokens]
    keys = guide.keys[question.row][:, tokens]
    labels = received_attention(queries, keys, rows, columns, guide.scale)
    return scaled_labels(labels, recipe.scaling, num_summed=queries.shape[0] * len(rows))


def stage1_step(
    model: Any,
    scorer: Scorer,
    samples: Sequence[EncodedSample],
    recipe: Stage1Recipe,
    layer_idx: int,
) -> Outcome:
    """Attention-guided."""
    batch = make_batch(model, samples, share_pictures=True)
    return label_loss(model, batch, score_batch(model, scorer, batch), recipe, layer_idx)


def stage2_step(
    model: Any,
    scorer: Scorer,
    samples: Sequence[EncodedSample],
    recipe: Stage2Recipe,
    *,
    progress: float,
    generator: torch.Generator,
    guide: tuple[Stage1Recipe, int],
) -> Outcome:
    """End to end: the language model's loss on the answers, under a soft mask in every layer.

    Args:
        model: the LVLM.
        scorer: the module.
        samples: encoded.
        recipe: stage 2's.
        guide: stage 1's recipe and guide layer, for ``label_weight``.
        progress: 0 at the first step, 1 at the last.
        generator: of budgets and noise, on the CPU.
    """
    batch = make_batch(model, samples, share_pictures=False)
    scored = score_batch(model, scorer, batch)
    temperature = recipe.temperature + progress * (recipe.final_temperature - recipe.temperature)
    key_bias = batch.embeddings.new_zeros(batch.embeddings.shape[:2], dtype=torch.float32)
    costs, means, overlaps = [], [], []
    for one in scored:
        draw = int(torch.randint(len(recipe.keep_ratio), (1,), generator=generator))
        keep_ratio = recipe.keep_ratio[draw]
        num_kept = kept_tokens(len(one.scores), keep_ratio)
        scores = one.scores + recipe.noise * temperature * _logistic(one.scores, generator)
        retention, bias = _soft_choice(scores, num_kept, recipe, temperature)
        key_bias = key_bias.index_put(
            (torch.tensor(one.question.row, device=bias.device), one.question.tokens[one.columns]),
            bias,
        )
        costs.append(budget_loss(retention, keep_ratio, recipe.budget))
        means.append(float(retention.detach().mean()))
        is_kept = retention.detach() > 0.5
        top = torch.zeros_like(is_kept)
        top[top_places(one.scores.detach(), num_kept)] = True
        overlaps.append(float((is_kept & top).sum() / (is_kept | top).sum()))
    where, targets = _answers(batch)
    positions = stage2_positions(batch, key_bias, recipe)
    short = without_tokens(batch, positions, key_bias, key_bias.detach() <= LEFT_BIAS)
    where = torch.stack([where[:, 0], short.place[where[:, 0], where[:, 1]]], dim=1)
    mask = biased_mask(short.allowed, short.key_bias, short.embeddings.dtype)
    logits = answer_logits(model, short.embeddings, short.positions, mask, where)
    lm = F.cross_entropy(logits, targets)
    budget = torch.stack(costs).mean()
    weight = recipe.budget_weight if recipe.mask == "sigmoid" else 0.0
    shown = {
        "lm": float(lm.detach()),
        "budget": float(budget.detach()),
        "mean_retention": _mean(means),
        "hard_soft_overlap": _mean(overlaps),
        "token_accuracy": float((logits.argmax(-1) == targets).float().mean()),
    }
    loss = lm + weight * budget
    if recipe.label_weight:
        labels = label_loss(model, batch, scored, *guide)
        loss = loss + recipe.label_weight * labels.loss
        shown |= labels.shown
    return Outcome(loss, shown)


def stage2_positions(batch: Batch, key_bias: Tensor, recipe: Stage2Recipe) -> Tensor:
    """The positions that the language model gets. [B, T], or [3, B, T] under M-RoPE."""
    if recipe.positions == "original" or batch.positions.dim() == 3:
        return batch.positions
    return compact_positions(key_bias)


def _soft_choice(
    scores: Tensor, num_kept: int, recipe: Stage2Recipe, temperature: float
) -> tuple[Tensor, Tensor]:
    """Retention and bias of an item. [C] each."""
    if recipe.mask == "straight_through":
        kept = top_places(scores.detach(), num_kept)
        retention = torch.zeros_like(scores).index_fill(0, kept, 1.0)
        return retention, straight_through_bias(scores, kept, temperature)
    if recipe.mask == "budgeted" and num_kept < len(scores):
        retention = budgeted_retention(scores, num_kept, temperature)
    elif recipe.mask == "budgeted":
        # Of the scores, though nothing hangs on them: a step of such items alone needs a gradient.
        retention = 0 * scores + 1
    else:
        retention = sigmoid_retention(scores, temperature)
    return retention, retention_bias(retention)


def _answers(batch: Batch) -> tuple[Tensor, Tensor]:
    """Row and token that each answer token is read from, [A, 2], and the token itself, [A]."""
    where, targets = [], []
    for question in batch.questions:
        sequence = question.sequence
        tokens = question.tokens[sequence.num_prompt - 1 : -1]
        where.append(torch.stack([torch.full_like(tokens, question.row), tokens], dim=1))
        targets.append(sequence.ids[sequence.num_prompt :])
    return torch.cat(where), torch.cat(targets)


def _logistic(like: Tensor, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(like.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    return (uniform / (1 - uniform)).log().to(like.device)


def _overlap(scores: Tensor, target: Tensor, num_kept: int) -> float:
    """Share of the ``num_kept`` best by target that the scores choose too."""
    chosen = set(top_places(scores.detach(), num_kept).tolist())
    return len(chosen & set(top_places(target, num_kept).tolist())) / num_kept


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
