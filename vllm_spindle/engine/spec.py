"""The KV-cache spec of a band: full attention whose prompt is reduced after prefill."""

from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import Self
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as

from vllm_spindle.policy import SpindlePolicy


@dataclass(frozen=True, kw_only=True)
class SpindleSpec(FullAttentionSpec):
    """Layers of one band share one KV-cache group; layers of two bands never do.

    ``max_memory_usage_bytes`` stays full attention's: a prompt is whole until its prefill ends.
    """

    band: int
    policy: SpindlePolicy

    @classmethod
    def of(cls, stock: FullAttentionSpec, *, band: int, policy: SpindlePolicy) -> Self:
        """The stock spec of a layer, as a member of a band."""
        return replace_as(stock, cls, band=band, policy=policy)

    @classmethod
    def merge(cls, specs: Sequence[Self]) -> Self:  # type: ignore[override]
        """One spec for a group; vLLM reads the error as "keep these apart"."""
        if any(spec != specs[0] for spec in specs[1:]):
            raise AssertionError("layers of different bands keep KV-cache groups of their own")
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether one group could hold them all: only a model of a single band."""
        return all(spec == self for spec in kv_cache_specs.values())
