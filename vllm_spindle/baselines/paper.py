"""SpindleKV as published (arXiv:2507.06517), at honest bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from vllm_spindle.baselines.base import Method, PromptLayer, ReducedLayer, keep_all
from vllm_spindle.core.bands import pyramid_ratios
from vllm_spindle.core.choice import ChoiceRule, rank_context
from vllm_spindle.core.codebook import Codebook, cover_heads
from vllm_spindle.core.codebook_bytes import dense_bytes, true_bytes
from vllm_spindle.core.rotary import rotate_keys, unrotate_keys

NUM_TRIALS = 7  # of the search for the context ratio: within 1 % of the context


@dataclass(frozen=True)
class CoveredCopies:
    """Copies of a layer's kept tokens, merged.

    Attributes:
        keys: rotated at their positions. [K, G, N, D], float32.
        values: [K, G, N, D], float32.
        counts: arguments of ``codebook_bytes.true_bytes``.
    """

    keys: Tensor
    values: Tensor
    counts: dict[str, int]


def cover_copies(
    layer: PromptLayer, kept: Tensor, thresholds: tuple[float, float]
) -> CoveredCopies:
    """Every query head's own copies of its tokens, one codebook per kv head for all of them.

    Args:
        layer: the prompt.
        kept: ascending positions. [K, G, N].
        thresholds: for keys and for values.

    Raises:
        ValueError: if the model does not turn its keys by a plain rotation.
    """
    # Here: it compiles kernels, which the other methods do without.
    from vllm_spindle.kernels.cover import WINDOW, CompiledBook

    if layer.cos_sin is None:
        raise ValueError("the paper's method: the keys are not turned by a plain rotation")
    num_kv_heads, group, _ = kept.shape
    heads = torch.arange(num_kv_heads, device=kept.device)[:, None, None]
    keys = unrotate_keys(layer.keys[heads, kept], kept, layer.cos_sin)
    values = layer.values[heads, kept].float()
    window = max(1, WINDOW // group)
    key_books = cover_heads(keys, "kv-group", thresholds[0], window, CompiledBook)
    value_books = cover_heads(values, "kv-group", thresholds[1], window, CompiledBook)
    counts = {
        "num_kept": kept.numel(),
        "num_key_entries": sum(len(book.entries) for book in key_books),
        "num_value_entries": sum(len(book.entries) for book in value_books),
        "head_size": keys.shape[-1],
    }
    keys = torch.cat([_stored(book) for book in key_books]).view(keys.shape)
    values = torch.cat([_stored(book) for book in value_books]).view(values.shape)
    return CoveredCopies(rotate_keys(keys, kept, layer.cos_sin), values, counts)


@dataclass(frozen=True)
class Paper(Method):
    """Every query head keeps its own tokens; copies and all merge into codebooks.

    Scores by eq. 2 literally, unpooled; budgets by the pyramid of eq. 4-6 with its sign corrected;
    the cover of Algorithm 1, one table per kv head. How far the tables shrink is known after the
    data, so the share of the context is searched, prompt by prompt, for the largest that fits the
    bytes: entries, an index and a norm of each copy's key and value, its position, all counted.

    Differs from the paper: the window stays dense, once per kv head, and tokens that come after the
    prompt do too.
    """

    window: int = 32
    beta: float = 0.05
    theta_key: float = 0.98
    theta_value: float = 0.95

    def reduce(self, layers: Sequence[PromptLayer], byte_ratio: float) -> list[ReducedLayer]:
        full = sum(layer.full_bytes for layer in layers)
        budget = int(Fraction(str(byte_ratio)) * full)
        num_context = layers[0].num_tokens - self.window
        if byte_ratio >= 1 or num_context <= 0:
            return [keep_all(layer) for layer in layers]
        rule = ChoiceRule("paper", 1, "unfold", window=self.window)
        window = torch.arange(num_context, layers[0].num_tokens)
        ranked = [
            rank_context(
                rule,
                layer.queries[:, :, -self.window :],
                layer.keys,
                window,
                scale=layer.scale,
                num_context=num_context,
                num_kept=num_context,
            )
            for layer in layers
        ]
        low, high = 0, 1 << NUM_TRIALS
        found = self._at(layers, ranked, Fraction(0))
        while high - low > 1:
            trial = (low + high) // 2
            reduced = self._at(layers, ranked, Fraction(trial, 1 << NUM_TRIALS), budget)
            if reduced is None:
                high = trial
            else:
                low, found = trial, reduced
        assert found is not None
        return found

    def _at(
        self,
        layers: Sequence[PromptLayer],
        ranked: Sequence[Tensor],
        context_ratio: Fraction,
        budget: int | None = None,
    ) -> list[ReducedLayer] | None:
        """With this share of the context, mean over layers; None if it takes more bytes."""
        ratios = pyramid_ratios(len(layers), context_ratio, Fraction(str(self.beta)))
        reduced: list[ReducedLayer] = []
        # Shallow layers are the largest: a trial that fails does so early.
        for layer, ranks, ratio in zip(layers, ranked, ratios, strict=True):
            reduced.append(self._layer(layer, ranks, int(ratio * ranks.shape[-1])))
            if budget is not None and sum(each.num_bytes for each in reduced) > budget:
                return None
        return reduced

    def _layer(self, layer: PromptLayer, ranks: Tensor, num_kept: int) -> ReducedLayer:
        num_kv_heads, group, num_context = ranks.shape
        kept = ranks[..., :num_kept].sort(dim=-1).values
        window_rows = num_kv_heads * (layer.num_tokens - num_context)
        num_bytes = dense_bytes(window_rows, layer.keys.shape[-1])
        shape: Any = (num_kv_heads * group, num_kept, layer.keys.shape[-1])
        if num_kept:
            copies = cover_copies(layer, kept, (self.theta_key, self.theta_value))
            keys, values = copies.keys.reshape(shape), copies.values.reshape(shape)
            num_bytes += true_bytes(**copies.counts)
        else:
            keys = values = layer.keys.new_zeros(shape)
        return ReducedLayer(
            keys=keys,
            values=values,
            is_there=torch.ones(shape[:2], dtype=torch.bool, device=kept.device),
            positions=kept.flatten(0, 1),
            num_context=num_context,
            num_bytes=num_bytes,
        )


def _stored(book: Codebook) -> Tensor:
    """The vectors as two-byte elements remember them. [N, D], float32."""
    return book.entries.bfloat16().float()[book.codes] * book.norms.half().float()[:, None]
