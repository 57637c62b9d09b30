"""What a band's reduced region holds: kept tokens as they are, or codebooks."""

from vllm_spindle.engine.codebook_region import CodebookRegion
from vllm_spindle.engine.evicted_regions import DenseRegion, HeadRegion
from vllm_spindle.policy import SpindlePolicy

Region = DenseRegion | HeadRegion | CodebookRegion


def make_region(policy: SpindlePolicy, band: int, head_size: int, heads: range) -> Region:
    """The region of a band, by its method. heads: kv heads of this rank."""
    if policy.profile is not None:
        return HeadRegion(policy, heads)
    method = policy.method_of_band(band)
    return DenseRegion(policy) if method == "evict" else CodebookRegion(policy, method, head_size)
