"""One protocol for every method that shrinks a prompt's cache, at equal true bytes.

A baseline answers one question, how important each token is (``score``), and may answer two
more: how the bytes are shared among layers (``layer_budgets``) and among kv heads
(``head_budgets``). A merging one also says what becomes of the tokens that are not kept
(``fold``). The rest is here, once.

Bytes are true ones: two-byte elements of the model's GQA cache, one row of keys and values per
token and kv head. A copy per query head is paid for, and so is what a method stores beside rows.
Every method is given the same bytes; its own dials (capacity, ratio) are converted to them.

Shapes: K kv heads, G query heads per kv head, T prompt tokens, D head size, L layers, N kept tokens
of the longest head, S heads that store tokens: K, or K * G where every query head has copies.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from vllm_spindle.core.budget_sharing import fill, share_out
from vllm_spindle.core.codebook_bytes import dense_bytes

NUM_FUTURE = 512  # positions behind the prompt that a method may ask the rotary table for
LENGTH_BYTES = 4  # int32: tokens of one kv head, where heads differ


@dataclass(frozen=True, slots=True)
class PromptLayer:
    """One layer's attention inputs over a whole prompt.

    Attributes:
        queries: rotated. [K, G, T, D].
        keys: rotated. [K, T, D].
        values: [K, T, D].
        scale: softmax scale.
        layer_idx: depth in the model.
        cos_sin: rotary table, see ``core/rotary.py``, of the prompt's positions and ``NUM_FUTURE``
            more; None for a model that turns its keys in another way. [at least T, D].
        repeated: rotated queries of the same tokens, read a second time behind the prompt, for
            methods that ask for them; or None. [K, G, T, D].
        ahead: rotated queries of the answer's first tokens, read from the whole cache and then
            taken back, for methods that ask for them; or None. [K, G, A, D].
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    layer_idx: int
    cos_sin: Tensor | None = None
    repeated: Tensor | None = None
    ahead: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.keys.shape[1]

    @property
    def full_bytes(self) -> int:
        """Of the layer's keys and values, nothing reduced."""
        return dense_bytes(self.keys.shape[0] * self.num_tokens, self.keys.shape[2])


@dataclass(frozen=True, slots=True)
class ReducedLayer:
    """What is left of a prompt in one layer: chosen context tokens, and a dense tail.

    Attributes:
        keys: rotated keys of the context tokens that are left. [S, N, D].
        values: [S, N, D].
        is_there: False where a head has fewer. [S, N], bool.
        positions: where the tokens stood in the prompt; anything where not there. [S, N], int64.
        num_context: prompt tokens that the above stands for; all later ones are kept dense.
        num_bytes: true bytes of all this and the prompt's dense tokens.
    """

    keys: Tensor
    values: Tensor
    is_there: Tensor
    positions: Tensor
    num_context: int
    num_bytes: int


class Method(ABC):
    """Anything that reduces a prompt to a share of its bytes."""

    reads_twice = False
    """Whether the prompt is to be read a second time for ``PromptLayer.repeated``."""

    @property
    def reads_ahead(self) -> int:
        """Tokens of its answer to decode for ``PromptLayer.ahead``, before it is reduced."""
        return 0

    @abstractmethod
    def reduce(self, layers: Sequence[PromptLayer], byte_ratio: float) -> list[ReducedLayer]:
        """The prompt in ``byte_ratio`` of its bytes over all layers, (0, 1]; never in more.

        The last prompt token is always among the dense ones.
        """


class Baseline(Method):
    """A method that keeps the tokens of the highest score."""

    num_recent: int = 1
    """Last tokens, always kept, as far as a layer's budget goes; at least 1."""

    def recent(self, num_kept: int) -> int:
        """Last tokens that a layer of ``num_kept`` tokens keeps, 1 to ``num_kept``."""
        return max(1, min(self.num_recent, num_kept))

    @abstractmethod
    def score(self, layer: PromptLayer) -> Tensor:
        """Importance of every token for each kv head, higher is kept. [K, T], float32."""

    def layer_budgets(self, layers: Sequence[PromptLayer], total: int) -> list[int]:
        """Tokens that a kv head keeps in each layer, ``total`` together; by default alike."""
        return share_tokens([Fraction(1)] * len(layers), total, layers[0].num_tokens)

    def head_budgets(self, scores: Tensor, num_kept: int) -> list[int] | None:
        """Tokens of each kv head, ``K * num_kept`` together at most; None for all alike."""
        return None

    def fold(self, layer: PromptLayer, num_context: int, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the kept context tokens, with what the others leave in them.

        Args:
            layer: the whole prompt.
            num_context: tokens that may be evicted; all later ones are kept.
            kept: ascending positions, below ``num_context`` where they are there. [K, N], int64.

        Returns:
            Twice [K, N, D].
        """
        return take(layer.keys, kept), take(layer.values, kept)

    def reduce(self, layers: Sequence[PromptLayer], byte_ratio: float) -> list[ReducedLayer]:
        total = total_tokens(layers, byte_ratio)
        if total == len(layers) * layers[0].num_tokens:
            return [keep_all(layer) for layer in layers]
        return self.reduce_to(layers, self.layer_budgets(layers, total))

    def reduce_to(
        self, layers: Sequence[PromptLayer], budgets: Sequence[int]
    ) -> list[ReducedLayer]:
        """Each layer in its budget of tokens per kv head."""
        return [
            self.choose(layer, self.score(layer).float(), budget)
            for layer, budget in zip(layers, budgets, strict=True)
        ]

    def choose(self, layer: PromptLayer, scores: Tensor, num_kept: int) -> ReducedLayer:
        """One layer's tokens by score. scores: [K, T]."""
        num_kv_heads, num_tokens = scores.shape
        num_recent = self.recent(num_kept)
        num_context = num_tokens - num_recent
        counts = self.head_budgets(scores[:, :num_context], num_kept - num_recent)
        most = num_kept - num_recent if counts is None else max(counts)
        best = scores[:, :num_context].topk(most, dim=-1).indices
        is_there = torch.ones_like(best, dtype=torch.bool)
        num_rows, beside = num_kv_heads * (most + num_recent), 0
        if counts is not None:
            lengths = torch.tensor(counts, device=best.device)
            is_there = torch.arange(most, device=best.device) < lengths[:, None]
            num_rows = sum(counts) + num_kv_heads * num_recent
            beside = LENGTH_BYTES * num_kv_heads
            # Behind everything, so that sorting leaves the tokens that are there in front.
            best = best.masked_fill(~is_there, num_context)
        positions = best.sort(dim=-1).values
        kept = positions.clamp(max=num_tokens - 1)
        keys, values = self.fold(layer, num_context, kept)
        return ReducedLayer(
            keys=keys,
            values=values,
            is_there=is_there,
            positions=kept,
            num_context=num_context,
            num_bytes=dense_bytes(num_rows, layer.keys.shape[2]) + beside,
        )


def total_tokens(layers: Sequence[PromptLayer], byte_ratio: float) -> int:
    """Tokens that a kv head may keep over all layers: the share, rounded down.

    Raises:
        ValueError: if the ratio is out of range or leaves less than a token per layer.
    """
    if not 0 < byte_ratio <= 1:
        raise ValueError(f"byte_ratio must be in (0, 1], got {byte_ratio}")
    # The decimal that the user wrote: 0.29 of 100 tokens is 29, not 28.
    total = int(Fraction(str(byte_ratio)) * len(layers) * layers[0].num_tokens)
    if total < len(layers):
        raise ValueError(
            f"byte_ratio={byte_ratio} of {layers[0].num_tokens} tokens is less than a token a layer"
        )
    return total


def share_tokens(weights: Sequence[Fraction], total: int, num_tokens: int) -> list[int]:
    """``total`` tokens over layers by weight, 1 to ``num_tokens`` each."""
    return share_out(fill(weights, total, num_tokens), total, floor=1, cap=num_tokens)


def keep_all(layer: PromptLayer) -> ReducedLayer:
    """Nothing reduced: the whole prompt is dense."""
    nothing = torch.zeros(layer.keys.shape[0], 0, dtype=torch.int64, device=layer.keys.device)
    return ReducedLayer(
        keys=layer.keys[:, :0],
        values=layer.values[:, :0],
        is_there=nothing.bool(),
        positions=nothing,
        num_context=0,
        num_bytes=layer.full_bytes,
    )


def take(tokens: Tensor, kept: Tensor) -> Tensor:
    """Rows of the kept tokens, chosen per kv head. tokens: [K, T, D]; kept: [K, N]. [K, N, D]."""
    return tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))
