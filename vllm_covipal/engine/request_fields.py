"""What a pruned item carries from the processor to the worker, beside vLLM's own fields.

One tensor per item and field, named after the modality as vLLM's field table wants it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig

PREFIX = "covipal_"
MODALITIES = ("image", "video")


@dataclass(frozen=True, slots=True)
class PruningRequest:
    """One item's pruning, known before its pixels are looked at.

    Attributes:
        keep_ratio: share of the candidates to keep, (0, 1).
        text_ids: text context that the choice may depend on; empty for a text-blind selector.
        media_hash: vLLM's own hash of the item, whatever the question.
    """

    keep_ratio: float
    text_ids: tuple[int, ...]
    media_hash: str

    def cache_hash(self, identity: str) -> str:
        """The item's key in the processor, encoder and prefix caches.

        Args:
            identity: of the selector, ``Options.identity``.
        """
        parts = [self.media_hash, identity, repr(self.keep_ratio), self.text_ids]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class ItemFields:
    """The same on the worker, as tensors were unpacked."""

    keep_ratio: float
    text_ids: torch.Tensor
    """[T], int64, on the model's device."""
    media_key: tuple[int, int]


def pack(modality: str, requests: Sequence[PruningRequest]) -> dict[str, Any]:
    """Fields of the items of one modality, as a transformers processor would give them."""
    prefix = PREFIX + modality
    return {
        f"{prefix}_keep_ratio": torch.tensor([r.keep_ratio for r in requests], dtype=torch.float64),
        f"{prefix}_text_ids": [torch.tensor(r.text_ids, dtype=torch.int64) for r in requests],
        f"{prefix}_media_key": torch.tensor([_key(r.media_hash) for r in requests]),
    }


def field_configs(modality: str) -> dict[str, MultiModalFieldConfig]:
    """How vLLM splits and batches them."""
    prefix = PREFIX + modality
    return {
        f"{prefix}_keep_ratio": MultiModalFieldConfig.batched(modality, keep_on_cpu=True),
        f"{prefix}_text_ids": MultiModalFieldConfig.batched(modality),
        f"{prefix}_media_key": MultiModalFieldConfig.batched(modality, keep_on_cpu=True),
    }


def take(kwargs: Mapping[str, Any]) -> tuple[str, list[ItemFields], dict[str, Any]]:
    """Unpack our fields of a batch.

    Returns:
        The batch's modality, the items' fields (none if the batch is not to be pruned), and
        vLLM's own fields.
    """
    rest = {key: value for key, value in kwargs.items() if not key.startswith(PREFIX)}
    for modality in MODALITIES:
        prefix = PREFIX + modality
        if f"{prefix}_keep_ratio" in kwargs:
            ratios, texts, keys = (
                kwargs[f"{prefix}_{name}"] for name in ("keep_ratio", "text_ids", "media_key")
            )
            return (
                modality,
                [
                    ItemFields(float(ratio), text, (int(key[0]), int(key[1])))
                    for ratio, text, key in zip(ratios, texts, keys, strict=True)
                ],
                rest,
            )
    return "", [], rest


def keep_ratio_of(mm_kwargs: Mapping[str, Sequence[Any]]) -> float | None:
    """The ratio that a processed prompt's items carry, 1.0 where they carry none.

    Args:
        mm_kwargs: vLLM's fields of each item, by modality; None for an item that another process
            has.

    Returns:
        The items' ratio; None if no item is there to say it.
    """
    for modality, items in mm_kwargs.items():
        for item in items:
            if item is not None:
                field = item.get(f"{PREFIX}{modality}_keep_ratio")
                return 1.0 if field is None else float(field.data)
    return None


def _key(media_hash: str) -> list[int]:
    digest = hashlib.sha256(media_hash.encode()).digest()
    return [int.from_bytes(digest[i : i + 8], "big", signed=True) for i in (0, 8)]
