"""Capture what attention saw and put out, per request, and compare it with the torch twin.

Queries, keys and values are taken as they enter the attention layer, row by row of the batch;
the twin works on them alone and never reads the paged cache.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from vllm.model_executor.models.utils import extract_layer_index

from vllm_spindle.choice_rule import choice_rule
from vllm_spindle.core.budget import BandPlan
from vllm_spindle.core.choice import choose_kept, keep_by_head, rank_context
from vllm_spindle.core.reference import attend_codebook, attend_reduced
from vllm_spindle.engine import codebook_region, reduction
from vllm_spindle.engine.active import active_reduction
from vllm_spindle.engine.backend import SpindleImplMixin
from vllm_spindle.engine.codebook_region import CodebookRegion
from vllm_spindle.engine.evicted_regions import DenseRegion, HeadRegion
from vllm_spindle.kernels.host_scoring import host_keys
from vllm_spindle.policy import SpindlePolicy

NUM_PROMPT_ROWS = 3


@dataclass
class Rows:
    """One request in one layer, by position: [T, H, D] or [T, K, D]."""

    chunks: list[tuple[int, tuple[Tensor, ...]]] = field(default_factory=list)

    def joined(self) -> tuple[Tensor, ...]:
        """Queries, keys, values, outputs of all positions; a position computed again counts."""
        num_tokens = max(first + len(tensors[0]) for first, tensors in self.chunks)
        joined = []
        for part in range(4):
            like = self.chunks[0][1][part]
            whole = torch.full((num_tokens, *like.shape[1:]), float("nan"), dtype=like.dtype)
            for first, tensors in self.chunks:
                whole[first : first + len(tensors[part])] = tensors[part]
            joined.append(whole)
        return tuple(joined)


@dataclass
class Captured:
    """Everything seen while capturing. Keys are (external request id, layer index)."""

    rows: dict[tuple[str, int], Rows] = field(default_factory=lambda: defaultdict(Rows))
    kept: dict[tuple[str, int], list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    codebooks: dict[tuple[str, int], list[Any]] = field(default_factory=lambda: defaultdict(list))
    cos_sin: Tensor | None = None
    mixed_steps: int = 0


def external(request_id: str) -> str:
    """The caller's id of a request; vLLM appends a dash and eight random characters."""
    return request_id.rpartition("-")[0]


@contextmanager
def capture() -> Iterator[Captured]:
    """Record attention and choices of every step inside the block."""
    seen = Captured()
    stock_forward = SpindleImplMixin.forward
    stock_fill = CodebookRegion.fill
    stock_pack = codebook_region.pack_region
    stock_keep, stock_by_head = DenseRegion.keep, HeadRegion.keep
    stock_reduce = reduction.Reducer.reduce
    reducing: list[str] = []
    merging: list[int] = []

    def forward(
        self: Any, layer: Any, query: Tensor, key: Tensor, value: Tensor, *a: Any, **kw: Any
    ) -> Tensor:
        output = stock_forward(self, layer, query, key, value, *a, **kw)
        step = active_reduction()
        if step is not None:
            layer_idx = extract_layer_index(layer.layer_name)
            batch = step._view.batch(step._scheduler_output)
            token = 0
            for request_id, computed, scheduled in zip(
                batch.request_ids, batch.num_computed, batch.num_scheduled, strict=True
            ):
                part = slice(token, token + scheduled)
                tensors = tuple(t[part].clone() for t in (query, key, value, output))
                seen.rows[external(request_id), layer_idx].chunks.append((int(computed), tensors))
                token += scheduled
            past = batch.num_computed >= batch.prompt_lens
            seen.mixed_steps += bool(layer_idx == 0 and past.any() and not past.all())
        return output

    def reduce(self: Any, end: Any, *a: Any) -> None:
        reducing[:] = [external(end.request_id)]
        stock_reduce(self, end, *a)

    def note(work: Any, kept: Tensor) -> None:
        seen.kept[reducing[0], work.layer.layer_idx].append(kept)

    def keep(self: Any, work: Any, kept: Tensor) -> None:
        counts = self.counts(work)
        num_heads = work.layer.kv_cache.shape[1]
        copies = (len(counts) // num_heads,) if len(counts) > num_heads else ()
        note(work, kept.view(num_heads, *copies, counts[0]))
        stock_keep(self, work, kept)

    def keep_by_head(self: Any, work: Any, kept: Tensor) -> None:
        note(work, _padded(list(kept.split(self.counts(work)))))
        stock_by_head(self, work, kept)

    def fill(self: Any, work: Any) -> float:
        seen.cos_sin = work.layer.cos_sin
        merging[:] = [work.layer.layer_idx]
        return stock_fill(self, work)

    def pack(kv_cache: Any, region: Any, shape: Any, *books: Any) -> None:
        seen.codebooks[reducing[0], merging[0]].append(books)
        stock_pack(kv_cache, region, shape, *books)

    SpindleImplMixin.forward = forward
    reduction.Reducer.reduce = reduce
    CodebookRegion.fill = fill
    codebook_region.pack_region = pack
    DenseRegion.keep, HeadRegion.keep = keep, keep_by_head
    try:
        yield seen
    finally:
        SpindleImplMixin.forward = stock_forward
        reduction.Reducer.reduce = stock_reduce
        CodebookRegion.fill = stock_fill
        codebook_region.pack_region = stock_pack
        DenseRegion.keep, HeadRegion.keep = stock_keep, stock_by_head


def entered_last_layer(seen: Captured, num_tokens: int) -> str:
    """Digest of a lone request's queries and keys in its last layer, which follow from all before.

    Equal digests: how the prompt was cut changed no bit of it, so it may change nothing else.
    """
    last = max(layer for _, layer in seen.rows)
    [rows] = [each for (_, layer), each in seen.rows.items() if layer == last]
    entered = [each[:num_tokens].float().tolist() for each in rows.joined()[:2]]
    return hashlib.sha256(repr(entered).encode()).hexdigest()


@dataclass
class Agreement:
    """The worst of all layers of all requests; relative errors of the 2-norm.

    Attributes:
        error: decode outputs against the twin over the kept tokens.
        error_to_full: the same outputs against full attention; large, or nothing was evicted.
        prompt_error: the prompt's last outputs, and those before it is reduced, against full
            attention.
        kept_differ: layers whose kept positions are not those of the core.
        rows: decode outputs compared.
        merged_rows: decode outputs of layers with codebooks.
        merged_error: those against attention over the codebooks in float32.
    """

    error: float = 0.0
    error_to_full: float = 0.0
    prompt_error: float = 0.0
    kept_differ: int = 0
    kept_layers: int = 0
    rows: int = 0
    merged_rows: int = 0
    merged_error: float = 0.0


def compare(
    seen: Captured, policy: SpindlePolicy, asks: dict[str, tuple[int, float | None]]
) -> Agreement:
    """Hold the captured requests against the twin.

    Args:
        seen: the capture.
        policy: the engine's.
        asks: per external request id, its prompt length and its own keep ratio.
    """
    result = Agreement()
    for (request_id, layer_idx), rows in seen.rows.items():
        prompt_len, keep_ratio = asks[request_id]
        reduce_at = policy.reduce_at(prompt_len)
        band = policy.band_of_layer(layer_idx)
        plan = policy.plan(prompt_len, keep_ratio)[band]
        ends = plan.prefix_blocks * policy.block_size, plan.tail_block * policy.block_size
        layer = TwinLayer(*rows.joined(), num_protected=ends[0], num_context=ends[1])
        kept = layer.everything
        codebooks = seen.codebooks.get((request_id, layer_idx))
        if codebooks:
            end = len(layer.queries)
            result.merged_rows += end - reduce_at
            error = layer.codebook_error(codebooks[-1], seen.cos_sin, reduce_at)
            result.merged_error = max(result.merged_error, error)
            continue
        if plan.is_reduced:
            chosen = layer.core_choice(policy, prompt_len, plan, layer_idx)
            kept = layer.with_prefix(chosen)
            found = seen.kept[request_id, layer_idx]
            result.kept_layers += 1
            if policy.method_of_band(band) == "evict":  # else a region too small for a codebook
                differ = not found or any(not torch.equal(chosen, each) for each in found)
                result.kept_differ += differ
        first_row = max(0, prompt_len - NUM_PROMPT_ROWS)
        end = len(layer.queries)
        prompt_error = layer.error(layer.everything, first_row, min(reduce_at, end))
        result.prompt_error = max(result.prompt_error, prompt_error)
        if end > reduce_at:
            result.rows += end - reduce_at
            result.error = max(result.error, layer.error(kept, reduce_at, end))
            to_full = layer.error(layer.everything, reduce_at, end)
            result.error_to_full = max(result.error_to_full, to_full)
    return result


@dataclass
class TwinLayer:
    """One request in one layer: rotated queries [T, H, D], keys and values [T, K, D]."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    outputs: Tensor
    num_protected: int
    num_context: int

    @property
    def everything(self) -> Tensor:
        """All context positions, for every kv head."""
        return torch.arange(self.num_context).expand(self.keys.shape[1], -1)

    def with_prefix(self, chosen: Tensor) -> Tensor:
        """The protected positions, then the chosen ones."""
        prefix = torch.arange(self.num_protected).expand(*chosen.shape[:-1], -1)
        # Where a head keeps fewer: a position that every query sees anyway.
        chosen = chosen.where(chosen >= 0, self.num_context)
        return torch.cat([prefix, chosen], dim=-1)

    @property
    def scale(self) -> float:
        """The softmax scale of the tiny models."""
        return self.queries.shape[-1] ** -0.5

    def core_choice(
        self, policy: SpindlePolicy, prompt_len: int, plan: BandPlan, layer_idx: int
    ) -> Tensor:
        """What the pure-torch core keeps; -1 where a head keeps fewer than others."""
        config = policy.config
        copies = policy.num_queries_per_kv if config.gqa == "unfold" else 1
        observed = torch.from_numpy(policy.recorded(prompt_len, [plan]))
        num_kv_heads, head_size = self.keys.shape[1:]
        scored = (
            choice_rule(config),
            self.queries[observed]
            .view(len(observed), num_kv_heads, -1, head_size)
            .permute(1, 2, 0, 3),
            # Scored by the kernel, if the engine's are: else ties of float32 fall either way.
            host_keys(self.keys[:prompt_len].transpose(0, 1)),
            observed,
        )
        counts = {
            "scale": self.scale,
            "num_context": self.num_context,
            "num_protected": self.num_protected,
            "num_ahead": config.reduce_after,
        }
        if policy.profile is not None:
            blocks = policy.head_blocks(layer_idx, plan, range(num_kv_heads))
            assert sum(blocks) == plan.reduced_blocks * num_kv_heads
            ranked = rank_context(*scored, **counts, num_kept=self.num_context - self.num_protected)
            return _padded(
                keep_by_head(ranked, [n * policy.block_size for n in blocks], self.num_context)
            )
        num_kept = plan.reduced_blocks * policy.block_size // copies
        return choose_kept(*scored, **counts, num_kept=num_kept)

    def codebook_error(self, codebooks: Any, cos_sin: Tensor, prompt_len: int) -> float:
        """Relative error of the decode outputs against the oracle over the layer's codebooks."""
        key_books, value_books, positions = codebooks
        twin = attend_codebook(
            self.queries[prompt_len:],
            key_books,
            value_books,
            positions,
            *(
                torch.cat([each[: self.num_protected], each[self.num_context :]])
                for each in (self.keys, self.values)
            ),
            cos_sin,
            scale=self.scale,
        )
        return _relative(twin, self.outputs[prompt_len:])

    def error(self, kept: Tensor, first: int, stop: int) -> float:
        """Relative error of outputs ``[first, stop)`` against the twin; inf for a NaN."""
        twin = attend_reduced(
            self.queries[first:stop],
            self.keys[:stop],
            self.values[:stop],
            kept,
            num_context=self.num_context,
            scale=self.scale,
        )
        return _relative(twin, self.outputs[first:stop])


def _padded(kept: Sequence[Tensor]) -> Tensor:
    """Positions of each kv head, -1 behind the shorter ones. [K, most]."""
    return pad_sequence(list(kept), batch_first=True, padding_value=-1)


def _relative(expected: Tensor, found: Tensor) -> float:
    """Error of the 2-norm; inf for a NaN, which no comparison would find."""
    error = ((expected - found.float()).norm() / expected.norm()).item()
    return math.inf if math.isnan(error) else error
