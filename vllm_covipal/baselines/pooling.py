"""Average pooling: fewer, larger cells; every token is left, blurred."""

import math
from typing import Any

import torch
from torch import Tensor

from vllm_covipal.core.budget import kept_tokens
from vllm_covipal.hf import EncodedPrompt, PrunedPrompt


def pooled_grid(rows: int, cols: int, num_kept: int) -> tuple[int, int]:
    """At most ``num_kept`` cells: as many as can be had, then as square as can be."""
    sizes = [
        (r, min(cols, num_kept // r)) for r in range(1, min(rows, num_kept) + 1) if num_kept // r
    ]
    return max(sizes, key=lambda s: (s[0] * s[1], -abs(math.log(s[0] * cols / (s[1] * rows)))))


def pool_prompt(model: Any, encoded: EncodedPrompt, keep_ratio: float) -> PrunedPrompt:
    """The prompt with the picture's rows averaged over a coarser grid.

    Raises:
        ValueError: for anything but one picture that is one grid, without M-RoPE.
    """
    (item,) = encoded.items
    if len(item.grids) != 1 or item.structure_mask is not None or encoded.positions is not None:
        raise ValueError("average pooling takes one picture that is one grid (LLaVA-1.5)")
    rows, cols = item.grids[0]
    grid = item.rows.T.unflatten(1, (rows, cols))
    size = pooled_grid(rows, cols, kept_tokens(rows * cols, keep_ratio))
    pooled = torch.nn.functional.adaptive_avg_pool2d(grid.float(), size).flatten(1).T
    return with_rows(model, encoded, pooled)


@torch.no_grad()
def with_rows(model: Any, encoded: EncodedPrompt, rows: Tensor) -> PrunedPrompt:
    """The prompt with other rows in place of the picture's, positions consecutive."""
    (item,) = encoded.items
    embeddings = model.get_input_embeddings()(encoded.prompt_ids)
    parts = (
        embeddings[: item.start],
        rows.to(embeddings.dtype),
        embeddings[item.start + len(item.rows) :],
    )
    joined = torch.cat(parts).unsqueeze(0)
    return PrunedPrompt(joined, None, joined.shape[1], (torch.arange(len(rows)),))
