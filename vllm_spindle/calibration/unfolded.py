"""The paper's route under grouped queries, as a reference: copies made, then absorbed.

Every query head keeps tokens of its own, copies of the kv head's; one codebook per kv head takes
them all in, as large as it needs to be. Nothing of it fits blocks that are counted before the data,
so it is measured here and not served. Shapes: K kv heads, G query heads per kv head, C context
tokens, N tokens that each query head keeps, D head size. Method: SpindleKV sec. 3.3-3.4
(arXiv:2507.06517).
"""

from dataclasses import dataclass

import torch

from vllm_spindle.calibration.attention import attend
from vllm_spindle.calibration.capture import CapturedPrompt
from vllm_spindle.core.budget import BandPlan
from vllm_spindle.core.choice import ChoiceRule, rank_context
from vllm_spindle.core.codebook import cover_heads, reconstruct
from vllm_spindle.core.codebook_bytes import dense_bytes, paper_ratio, true_bytes
from vllm_spindle.core.rotary import rotate_keys, unrotate_keys
from vllm_spindle.kernels.numba_cover import WINDOW, CompiledBook
from vllm_spindle.policy import SpindlePolicy


@dataclass(frozen=True)
class UnfoldedLayer:
    """One layer of one prompt, its context alone.

    Attributes:
        paper_ratio: by eq. 15, of a cache G times the true one.
        true_ratio: entries, an index and a norm for every copy, and positions, over the bytes of
            the true GQA cache.
        answer_error: relative L2 error of the attention output at the answer's queries.
    """

    paper_ratio: float
    true_ratio: float
    answer_error: float


def unfold_layer(
    policy: SpindlePolicy, plan: BandPlan, prompt: CapturedPrompt, layer_idx: int
) -> UnfoldedLayer:
    """Every query head keeps the share of its band's plan; its copies share the kv head's table."""
    layer, config = prompt.layers[layer_idx], policy.config
    num_kv_heads, group, _, head_size = layer.queries.shape
    num_context = plan.tail_block * policy.block_size
    num_kept = plan.reduced_blocks * policy.block_size
    kept = rank_context(
        ChoiceRule(config.score, config.pool_kernel, "unfold", config.seed),
        layer.queries[:, :, : -len(prompt.answer)],
        layer.keys[:, : prompt.prompt_len],
        scale=layer.scale,
        num_context=num_context,
        num_kept=num_kept,
    )
    kept = kept.sort(dim=-1).values  # [K, G, N]
    heads = torch.arange(num_kv_heads)[:, None, None]
    keys = unrotate_keys(layer.keys[heads, kept], kept, prompt.cos_sin)
    values = layer.values[heads, kept].float()
    window = max(1, WINDOW // group)
    key_books = cover_heads(keys, "kv-group", config.theta_key, window, CompiledBook)
    value_books = cover_heads(values, "kv-group", config.theta_value, window, CompiledBook)
    counts = {
        "num_kept": kept.numel(),
        "num_key_entries": sum(len(book.entries) for book in key_books),
        "num_value_entries": sum(len(book.entries) for book in value_books),
        "head_size": head_size,
    }
    keys = torch.cat([reconstruct(book) for book in key_books]).view(keys.shape)
    values = torch.cat([reconstruct(book) for book in value_books]).view(values.shape)
    # Each query head is a kv head of its own now.
    queries = layer.queries[:, :, -len(prompt.answer) :].flatten(0, 1).unsqueeze(1)
    own_keys, own_values = (t.repeat_interleave(group, 0) for t in (layer.keys, layer.values))
    context = (
        rotate_keys(keys, kept, prompt.cos_sin).flatten(0, 1),
        values.flatten(0, 1),
        torch.ones(num_kv_heads * group, num_kept, dtype=torch.bool),
    )
    tail = own_keys[:, num_context:], own_values[:, num_context:]
    whole = own_keys[:, :num_context], own_values[:, :num_context]
    all_there = torch.ones(num_kv_heads * group, num_context, dtype=torch.bool)
    expected = attend(queries, *whole, all_there, *tail, layer.scale)
    found = attend(queries, *context, *tail, layer.scale)
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-12)
    dense = dense_bytes(num_context * num_kv_heads, head_size)
    return UnfoldedLayer(
        paper_ratio=float(paper_ratio(num_tokens=num_context * num_kv_heads * group, **counts)),
        true_ratio=true_bytes(**counts) / dense,
        answer_error=float(error.mean()),
    )
