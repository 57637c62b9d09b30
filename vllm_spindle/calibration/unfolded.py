"""The paper's route under grouped queries, as a reference: copies made, then absorbed.

Every query head keeps tokens of its own, copies of the kv head's; one codebook per kv head takes
them all in, as large as it needs to be. Nothing of it fits blocks that are counted before the data,
so it is measured here and not served. Shapes: K kv heads, G query heads per kv head, C context
tokens, N tokens that each query head keeps, D head size. Method: SpindleKV sec. 3.3-3.4
(arXiv:2507.06517).
"""

from dataclasses import dataclass

import torch

from vllm_spindle.baselines.base import PromptLayer
from vllm_spindle.baselines.paper import cover_copies
from vllm_spindle.calibration.attention import attend
from vllm_spindle.calibration.capture import CapturedPrompt
from vllm_spindle.choice_rule import choice_rule
from vllm_spindle.core.budget import BandPlan
from vllm_spindle.core.choice import rank_context
from vllm_spindle.core.codebook_bytes import dense_bytes, paper_ratio, true_bytes
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
    queries = layer.queries[:, :, : -len(prompt.answer)]
    observed = torch.from_numpy(policy.observed(prompt.prompt_len, [plan]))
    kept = rank_context(
        choice_rule(config, seed=config.seed, gqa="unfold"),
        queries[:, :, observed - (prompt.prompt_len - queries.shape[2])],
        layer.keys[:, : prompt.prompt_len],
        observed,
        scale=layer.scale,
        num_context=num_context,
        num_kept=num_kept,
    )
    kept = kept.sort(dim=-1).values  # [K, G, N]
    copies = cover_copies(
        PromptLayer(
            layer.queries, layer.keys, layer.values, layer.scale, layer_idx, prompt.cos_sin
        ),
        kept,
        (config.theta_key, config.theta_value),
    )
    # Each query head is a kv head of its own now.
    queries = layer.queries[:, :, -len(prompt.answer) :].flatten(0, 1).unsqueeze(1)
    own_keys, own_values = (t.repeat_interleave(group, 0) for t in (layer.keys, layer.values))
    context = (
        copies.keys.flatten(0, 1),
        copies.values.flatten(0, 1),
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
        paper_ratio=float(
            paper_ratio(num_tokens=num_context * num_kv_heads * group, **copies.counts)
        ),
        true_ratio=true_bytes(**copies.counts) / dense,
        answer_error=float(error.mean()),
    )
