"""Random rows: the baseline that any selector must beat."""

import hashlib
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vllm_covipal.core.visual_item import VisualItem
from vllm_covipal.selectors.base import Selector


class RandomSelector(Selector):
    """Uniform without replacement, drawn from the seed and the item's own count of candidates.

    The first K of one permutation: what a smaller budget keeps, a larger one keeps too.
    """

    name: ClassVar[str] = "random"
    uses_text: ClassVar[bool] = False

    def __init__(self, seed: int = 0) -> None:
        """Args: seed: another seed, another choice."""
        self.seed = seed

    def _choose(self, items: Sequence[VisualItem]) -> list[Tensor]:
        return [self._order(item.num_candidates)[: item.num_kept] for item in items]

    def _order(self, num_candidates: int) -> Tensor:
        text = f"{self.seed}:{num_candidates}".encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.randperm(num_candidates, generator=generator, device="cpu")
