"""Stage-1 labels: how much attention a deep layer pays to each visual token.

Shapes: H query heads, K kv heads, R label rows (queries), N tokens, C candidates, S head size.
Method: CoViPAL (arXiv:2508.17243) stage 1 sums one deep layer's attention weights over all heads
and over the last N_v rows, N_v the number of visual tokens ("literal"). That counts rows of the
picture itself, and early tokens more often than late ones. The other choices of rows, and every
normalisation but "none", are ours.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

RowsKind = Literal["literal", "after", "last"]
Scaling = Literal["none", "mean", "log", "zscore", "rank"]

FLOOR = 1e-6
"""Attention below which its logarithm says nothing more."""


def label_rows(
    kind: RowsKind, *, num_tokens: int, num_visual: int, media_end: int, num_prompt: int
) -> range:
    """The queries whose attention is summed.

    Args:
        kind: ``literal``, the last ``num_visual`` rows; ``after``, all rows after the picture;
            ``last``, the prompt's last token, which says the answer's first.
        num_tokens: of prompt and answer.
        num_visual: rows of all pictures.
        media_end: index after the last picture.
        num_prompt: tokens of the prompt.
    """
    if kind == "literal":
        return range(max(0, num_tokens - num_visual), num_tokens)
    if kind == "after":
        return range(media_end, num_tokens)
    if kind == "last":
        return range(num_prompt - 1, num_prompt)
    raise ValueError(f"rows must be one of {', '.join(get_args(RowsKind))}, got {kind!r}")


def received_attention(
    queries: Tensor, keys: Tensor, rows: range, columns: Tensor, scale: float
) -> Tensor:
    """Attention weight of each column, summed over heads and rows. Causal.

    Only the label rows' scores are computed: R x N for each head, never N x N.

    Args:
        queries: of all tokens, positions applied. [H, N, S].
        keys: likewise. [K, N, S], H a multiple of K.
        rows: label rows, each in [0, N).
        columns: candidates' token indices. [C], int64.
        scale: of the scores, before the softmax.

    Returns:
        [C], float32, each in [0, H * R].
    """
    num_heads, num_tokens, _ = queries.shape
    chosen = queries[:, rows.start : rows.stop].float()
    grouped = chosen.reshape(keys.shape[0], num_heads // keys.shape[0], *chosen.shape[1:])
    scores = torch.einsum("kgrs,kns->kgrn", grouped, keys.float()) * scale
    index = torch.arange(num_tokens, device=queries.device)
    hidden = index[None, :] > index[rows.start : rows.stop, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return weights.sum((0, 1, 2)).index_select(0, columns)


def scaled_labels(labels: Tensor, scaling: Scaling, *, num_summed: int) -> Tensor:
    """The regression target of one item.

    Args:
        labels: from ``received_attention``. [C].
        scaling: ``none``; ``mean``, over heads and rows; ``log`` of the mean; ``zscore``, that
            logarithm with mean 0 and deviation 1; ``rank``, 0 for the lowest to 1.
        num_summed: heads times rows.

    Returns:
        [C], float32.
    """
    if scaling == "none":
        return labels
    mean = labels / num_summed
    if scaling == "mean":
        return mean
    if scaling == "rank":
        places = labels.argsort(stable=True).argsort().float()
        return places / max(1, labels.shape[0] - 1)
    logarithm = mean.clamp(min=FLOOR).log()
    if scaling == "log":
        return logarithm
    if scaling == "zscore":
        centred = logarithm - logarithm.mean()
        return centred / centred.square().mean().sqrt().clamp(min=FLOOR)
    raise ValueError(f"scaling must be one of {', '.join(get_args(Scaling))}, got {scaling!r}")
