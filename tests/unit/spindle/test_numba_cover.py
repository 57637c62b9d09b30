"""The compiled cover against its slow twin in core, and against what must hold of any cover."""

import numpy as np
import pytest
import torch

from vllm_spindle.core import codebook as slow
from vllm_spindle.kernels import numba_cover as fast


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "f32"], autouse=True)
def product_dtype(request, monkeypatch) -> torch.dtype:
    """Both ways to sift, whatever this machine would choose."""
    monkeypatch.setattr(fast, "_product_dtype", lambda: request.param)
    return request.param


def _clustered(num_vectors: int, head_size: int, num_clusters: int, noise: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_clusters, head_size, generator=generator)
    which = torch.randint(0, num_clusters, (num_vectors,), generator=generator)
    spread = noise * torch.rand(num_vectors, 1, generator=generator)
    vectors = centres[which] + spread * torch.randn(num_vectors, head_size, generator=generator)
    return vectors * (0.5 + 3 * torch.rand(num_vectors, 1, generator=generator))


def _assert_same(got: slow.Codebook, expected: slow.Codebook) -> None:
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.entries, expected.entries)
    assert torch.equal(got.norms, expected.norms)
    assert got.num_overflow == expected.num_overflow
    torch.testing.assert_close(got.similarity, expected.similarity, rtol=0, atol=1e-6)


@pytest.mark.parametrize("head_size", [32, 64, 128])
@pytest.mark.parametrize("capacity", [None, 1, 7, 60])
@pytest.mark.parametrize("window", [64, 100, 1024])
def test_equals_the_slow_twin(head_size: int, capacity: int | None, window: int) -> None:
    """Same entries, codes and overflow, with room for all and without."""
    for seed, noise in enumerate((0.0, 0.15, 0.3)):
        vectors = _clustered(257, head_size, 50, noise, seed)
        for threshold in (0.98, 0.95):
            expected = slow.windowed_cover(vectors, threshold, capacity, window)
            _assert_same(fast.windowed_cover(vectors, threshold, capacity, window), expected)


def test_threshold_does_not_round_down() -> None:
    """Cosines within bfloat16's rounding of the threshold are decided as in float32."""
    angles = np.arccos(np.linspace(0.976, 0.984, 81))
    for angle in angles:
        pair = torch.zeros(2, 32)
        pair[0, 0] = 1
        pair[1, 0], pair[1, 1] = float(np.cos(angle)), float(np.sin(angle))
        expected = 1 if np.cos(angle) > 0.98 else 2
        if abs(np.cos(angle) - 0.98) < 1e-6:
            continue
        assert len(fast.windowed_cover(pair, 0.98, None, 2).entries) == expected
        assert len(fast.windowed_cover(pair, 0.98, None, 1).entries) == expected  # by matching


def test_nearest_of_near_equals() -> None:
    """Overflow goes to the nearest entry even where bfloat16 cannot tell which that is."""
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(1, 64, generator=generator) + 0.05 * torch.randn(
        300, 64, generator=generator
    )
    expected = slow.windowed_cover(vectors, 0.9999, 20, 64)
    got = fast.windowed_cover(vectors, 0.9999, 20, 64)
    assert expected.num_overflow > 200
    _assert_same(got, expected)


def test_extremes() -> None:
    """Identical vectors need one entry, orthogonal ones an entry each, zero vectors none."""
    vector = torch.randn(1, 32)
    assert len(fast.windowed_cover(vector.expand(99, -1), 0.98, None, 10).entries) == 1
    assert len(fast.windowed_cover(torch.eye(32), 0.98, None, 10).entries) == 32
    mixed = torch.cat([torch.zeros(3, 32), vector, torch.zeros(2, 32)])
    _assert_same(fast.windowed_cover(mixed, 0.98, 4, 2), slow.windowed_cover(mixed, 0.98, 4, 2))
    nothing = torch.zeros(5, 32)
    _assert_same(fast.windowed_cover(nothing, 0.98, 4, 2), slow.windowed_cover(nothing, 0.98, 4, 2))
    assert len(fast.windowed_cover(torch.empty(0, 32), 0.98, None).codes) == 0


def test_layer_is_its_heads() -> None:
    """``cover_layer`` gives every head the codebook it would get alone, as ``cover_heads`` does."""
    vectors = torch.stack([_clustered(120, 32, 20, 0.2, seed) for seed in range(3)])
    expected = slow.cover_heads(vectors, "head", 0.95, 15, window=50)
    got = fast.cover_layer(vectors, 0.95, 15, window=50)
    for one, other in zip(got, expected, strict=True):
        _assert_same(one, other)


def test_bfloat16_input() -> None:
    """Values come from the cache in bfloat16."""
    vectors = _clustered(200, 64, 30, 0.2, 1).bfloat16()
    _assert_same(
        fast.windowed_cover(vectors, 0.95, 40, 64), slow.windowed_cover(vectors, 0.95, 40, 64)
    )


@pytest.mark.parametrize(("threshold", "capacity", "window"), [(0, 1, 1), (0.9, 0, 1), (0.9, 1, 0)])
def test_refusals(threshold: float, capacity: int, window: int) -> None:
    """Arguments out of range are refused."""
    with pytest.raises(ValueError):
        fast.windowed_cover(torch.ones(2, 32), threshold, capacity, window)
