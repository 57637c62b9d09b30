"""Greedy answers to many pruned prompts at once.

Shapes: B prompts, P tokens of the longest one, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_covipal.hf import PrunedPrompt


@torch.no_grad()
def greedy_answers(
    model: Any, prompts: Sequence[PrunedPrompt], *, max_new_tokens: int
) -> list[list[int]]:
    """Token ids that follow each prompt, the stop token left out.

    What ``hf.generate_greedy`` says of each alone, in one batch: padded on the left, positions of
    each prompt its own.
    """
    embeddings, mask, positions = _stacked(prompts)
    stop = _stop_ids(model)
    said: list[list[int]] = [[] for _ in prompts]
    is_open = [True] * len(prompts)
    cache = None
    following = torch.tensor([_next_position(p) for p in prompts], device=mask.device)
    for step in range(max_new_tokens):
        output = model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        tokens = output.logits[:, -1].argmax(-1)
        for i, token in enumerate(tokens.tolist()):
            is_open[i] = is_open[i] and token not in stop
            if is_open[i]:
                said[i].append(token)
        if not any(is_open):
            break
        cache = output.past_key_values
        embeddings = model.get_input_embeddings()(tokens[:, None])
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        column = (following + step)[:, None]
        positions = column if positions.dim() == 2 else column.expand(3, -1, -1)
    return said


def _stop_ids(model: Any) -> set[int]:
    eos = model.generation_config.eos_token_id
    return set(eos) if isinstance(eos, list) else {eos}


def _next_position(prompt: PrunedPrompt) -> int:
    """Of the first generated token: consecutive, or the unpruned prompt's under M-RoPE."""
    return int(prompt.embeddings.shape[1]) if prompt.positions is None else prompt.next_position


def _stacked(prompts: Sequence[PrunedPrompt]) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [B, P, D], mask [B, P], positions [B, P] or [3, B, P], padded on the left."""
    num_tokens = max(prompt.embeddings.shape[1] for prompt in prompts)
    rows, masks, positions = [], [], []
    for prompt in prompts:
        size = prompt.embeddings.shape[1]
        missing = (num_tokens - size, 0)
        rows.append(torch.nn.functional.pad(prompt.embeddings[0], (0, 0, *missing)))
        mask = torch.ones(size, dtype=torch.int64, device=rows[0].device)
        masks.append(torch.nn.functional.pad(mask, missing))
        own = torch.arange(size, device=rows[0].device)
        own = own if prompt.positions is None else prompt.positions[:, 0]
        positions.append(torch.nn.functional.pad(own, missing))
    return torch.stack(rows), torch.stack(masks), torch.stack(positions, dim=-2)
