"""Kept embeddings: bounded in bytes, least recently used out."""

import torch

from vllm_covipal.engine.feature_cache import FeatureCache

ROWS = torch.zeros(4, 8)  # 128 bytes


def test_least_recently_used_goes_first() -> None:
    """Three fit; a fourth takes the place of the one not asked for."""
    cache = FeatureCache(3 * ROWS.nbytes)
    for i in range(3):
        cache.put((0, i), ROWS + i)
    assert cache.get((0, 0)) is not None
    cache.put((0, 3), ROWS)
    assert cache.get((0, 1)) is None
    assert torch.equal(cache.get((0, 2)), ROWS + 2)
    assert cache.num_bytes == 3 * ROWS.nbytes


def test_never_over_its_bytes() -> None:
    """What is larger than the cache is not kept, and a cache of 0 bytes keeps nothing."""
    cache = FeatureCache(ROWS.nbytes)
    cache.put((0, 0), torch.zeros(5, 8))
    assert cache.num_bytes == 0
    empty = FeatureCache(0)
    empty.put((0, 0), ROWS)
    assert empty.get((0, 0)) is None


def test_a_kept_item_does_not_hold_its_batch() -> None:
    """An item is a view of its batch's rows: kept, it is a copy."""
    cache = FeatureCache(1 << 20)
    batch = torch.zeros(100, 4, 8)
    cache.put((0, 0), batch[3])
    assert cache.get((0, 0)).untyped_storage().nbytes() == ROWS.nbytes
