"""The worker's side: encode what is not known yet, choose rows, hand on the kept ones.

Shapes: N rows of an item, D width of the language model, T text tokens.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tp_group

from vllm_covipal.core.budget import kept_tokens
from vllm_covipal.core.fingerprint import fingerprint
from vllm_covipal.core.pruner_files import load_pruning_module
from vllm_covipal.core.visual_item import VisualItem
from vllm_covipal.engine.batches import join_items, micro_batches, split_items
from vllm_covipal.engine.families import Family
from vllm_covipal.engine.feature_cache import FeatureCache
from vllm_covipal.engine.options import Options
from vllm_covipal.engine.request_fields import ItemFields
from vllm_covipal.selectors import build_selector

MIB = 1 << 20


@dataclass
class PrunerStats:
    """What a worker did since it was last asked."""

    items: int = 0
    encoded: int = 0
    reused: int = 0
    seconds: float = 0.0
    """Spent choosing, the vision tower left out."""


class VisualPruner:
    """Prunes the items of one model."""

    def __init__(self, options: Options, family: Family, model: Any, vllm_config: Any) -> None:
        """Load the pruning module, if there is one.

        Raises:
            ValueError: if its files cannot be read or it was trained for another model.
        """
        config = options.config
        module = None
        if config.ppm is not None:
            model_config = vllm_config.model_config
            module = load_pruning_module(
                config.ppm,
                fingerprint=fingerprint(model_config.hf_config),
                model_name=model_config.model,
                device=vllm_config.device_config.device,
            )
        self._selector = build_selector(config.selector, pruning_module=module, seed=config.seed)
        self._family = family
        self._model = model
        self._reused = FeatureCache(config.reuse_mib * MIB)
        self._max_rows = vllm_config.scheduler_config.max_num_encoder_input_tokens
        self._stats = PrunerStats()

    def take_stats(self) -> dict[str, Any] | None:
        """Counts since the last call; None if nothing happened."""
        stats, self._stats = self._stats, PrunerStats()
        return {f.name: getattr(stats, f.name) for f in fields(stats)} if stats.items else None

    def forget(self) -> None:
        """Drop the embeddings that are kept for other questions."""
        self._reused.clear()

    @torch.inference_mode()
    def __call__(
        self,
        modality: str,
        requests: Sequence[ItemFields],
        batch: Mapping[str, Any],
        encode: Callable[..., Sequence[Tensor]],
        embed_text: Callable[[Tensor], Tensor],
    ) -> list["PrunedItem"]:
        """Prune a batch of items.

        Args:
            modality: image or video.
            requests: what to keep of each.
            batch: vLLM's processor fields of the batch.
            encode: vLLM's own encoder: fields of a batch -> rows of each item.
            embed_text: token ids -> embeddings of the language model.
        """
        items = split_items(batch, self._family.flat_fields, len(requests))
        rows = self._encoded(modality, requests, items, encode)
        start = time.perf_counter()
        visual_items = [
            self._visual_item(modality, *each, embed_text)
            for each in zip(requests, items, rows, strict=True)
        ]
        indices = _of_rank_zero(self._selector.select(visual_items))
        pruned = [
            PrunedItem(of_item.index_select(0, index), index, own)
            for of_item, index, own in zip(rows, indices, items, strict=True)
        ]
        self._stats.items += len(items)
        self._stats.seconds += time.perf_counter() - start
        return pruned

    def _encoded(
        self,
        modality: str,
        requests: Sequence[ItemFields],
        items: Sequence[Mapping[str, Any]],
        encode: Callable[..., Sequence[Tensor]],
    ) -> list[Tensor]:
        """Unpruned rows of each item: kept ones, or encoded within vLLM's encoder budget.

        vLLM's scheduler counts the rows that are kept, so that a step may bring it more items
        than its budget was made for.
        """
        found = {r.media_key: self._reused.get(r.media_key) for r in requests}
        missing = {r.media_key: i for i, r in enumerate(requests) if found[r.media_key] is None}
        places = list(missing.values())
        sizes = [self._family.num_encoder_rows(self._model, modality, items[i]) for i in places]
        for run in micro_batches(sizes, self._max_rows):
            members = [places[j] for j in run]
            batch = join_items([items[i] for i in members], self._family.flat_fields)
            for i, rows in zip(members, encode(**batch), strict=True):
                key = requests[i].media_key
                found[key] = rows.reshape(-1, rows.shape[-1])
                self._reused.put(key, found[key])
        self._stats.encoded += len(missing)
        self._stats.reused += len(requests) - len(missing)
        return [found[r.media_key] for r in requests]

    def _visual_item(
        self,
        modality: str,
        request: ItemFields,
        item_fields: Mapping[str, Any],
        rows: Tensor,
        embed_text: Callable[[Tensor], Tensor],
    ) -> VisualItem:
        layout = self._family.layout(self._model, modality, rows, item_fields)
        mask = layout.structure_mask
        num_candidates = rows.shape[0] - (0 if mask is None else int(mask.sum()))
        has_text = self._selector.uses_text and request.text_ids.numel() > 0
        return VisualItem(
            visual=rows,
            text=embed_text(request.text_ids) if has_text else rows[:0],
            structure_mask=mask,
            grids=layout.grids,
            num_kept=kept_tokens(num_candidates, request.keep_ratio),
        )


@dataclass(frozen=True)
class PrunedItem:
    """One item after its choice."""

    rows: Tensor
    """Kept rows in their order. [K, D]."""
    indices: Tensor
    """Which rows of the unpruned item they are, ascending. [K], int64."""
    fields: Mapping[str, Any] = field(repr=False)
    """The item's processor fields."""


def forget_encoded(runner: Any) -> None:
    """A model runner's encoder cache was reset: what the pruner keeps is as old."""
    pruner = getattr(runner.get_model(), "visual_pruner", None)
    if pruner is not None:
        pruner.forget()


def _of_rank_zero(indices: list[Tensor]) -> list[Tensor]:
    """The same choice on every tensor-parallel rank: rounding may differ between them."""
    group = get_tp_group()
    if group.world_size == 1:
        return indices
    joined = group.broadcast(torch.cat(indices), src=0)
    return list(joined.split([index.shape[0] for index in indices]))
