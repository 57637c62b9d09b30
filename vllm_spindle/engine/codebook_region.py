"""The region of a band that merges: codebooks.

Shapes: K kv heads, C context tokens, D head size.
"""

from dataclasses import dataclass, field

import torch

from vllm_spindle.core.admission import Admitted
from vllm_spindle.core.budget import BandPlan
from vllm_spindle.core.choice import rank_maps
from vllm_spindle.core.rotary import unrotate_keys
from vllm_spindle.engine.codebook_shape import codebook_shape
from vllm_spindle.engine.layer_reduction import LayerReduction
from vllm_spindle.kernels.region import pack_region
from vllm_spindle.kernels.region_shape import RegionShape
from vllm_spindle.policy import SpindlePolicy


@dataclass
class CodebookStats:
    """Codebooks built since the last report, summed over heads and layers.

    Attributes:
        vectors: keys and values that have a code.
        entries: in use.
        capacity: entries that there was room for.
        overflow: keys and values of tokens that found no entry and no room for one.
        similarity_sum: cosines of the vectors to their entries.
    """

    vectors: int = 0
    entries: int = 0
    capacity: int = 0
    overflow: int = 0
    similarity_sum: float = 0.0


@dataclass
class CodebookRegion:
    """Merging: entries, codes, norms and positions of the best tokens that find an entry."""

    policy: SpindlePolicy
    method: str
    head_size: int
    stats: CodebookStats = field(default_factory=CodebookStats)

    def shape(self, plan: BandPlan) -> RegionShape:
        """Tokens and entries that the region has room for, per kv head."""
        return codebook_shape(
            self.policy.config, self.method, plan, self.policy.block_size, self.head_size
        )

    def fill(self, work: LayerReduction) -> float:
        """Reduce one prompt in one layer.

        Returns:
            Tokens that have a code, mean over kv heads.
        """
        shape = self.shape(work.plan)
        if shape.num_tokens == 0:
            return 0
        layer, context = work.layer, work.context
        assert layer.cos_sin is not None
        # Not before vLLM has started: its kernel registration trips over numba's modules.
        from vllm_spindle.kernels.cover import admit_layer

        keys, values = work.tokens.read()
        places = torch.arange(context.stop, device=keys.device)
        keys = unrotate_keys(keys[:, : context.stop], places, layer.cos_sin)
        ranked = rank_maps(
            work.rule,
            work.maps(),
            num_kept=len(context),
            num_protected=context.start,
            visual=work.visual,
        )
        # On the CPU, wherever the cache is: which token finds an entry depends on those before it.
        heads = admit_layer(
            keys.cpu(),
            values[:, : context.stop].cpu(),
            ranked.cpu(),
            (self.policy.config.theta_key, self.policy.config.theta_value),
            (shape.num_key_entries, shape.num_value_entries, shape.num_tokens),
        )
        tokens = [head.tokens for head in heads]
        key_books, value_books = [head.keys for head in heads], [head.values for head in heads]
        pack_region(layer.kv_cache, work.region, shape, key_books, value_books, tokens)
        for head in heads:
            self._count(head, shape)
        return sum(map(len, tokens)) / len(tokens)

    def _count(self, head: Admitted, shape: RegionShape) -> None:
        self.stats.capacity += shape.num_key_entries + shape.num_value_entries
        self.stats.overflow += 2 * head.num_refused
        for book in (head.keys, head.values):
            self.stats.vectors += len(book.codes)
            self.stats.entries += len(book.entries)
            self.stats.similarity_sum += float(book.similarity.sum())
