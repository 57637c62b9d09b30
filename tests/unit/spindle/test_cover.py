"""The compiled cover against its slow twin in core, and against what must hold of any cover."""

import numpy as np
import pytest
import torch

from vllm_spindle.core import codebook as slow
from vllm_spindle.core.admission import admit
from vllm_spindle.kernels import cover as fast


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
    torch.testing.assert_close(got.similarity, expected.similarity, rtol=0, atol=1e-6)


def _cover(vectors: torch.Tensor, threshold: float, window: int) -> slow.Codebook:
    return slow.windowed_cover(vectors, threshold, window, fast.CompiledBook)


@pytest.mark.parametrize("head_size", [32, 64, 128])
@pytest.mark.parametrize("window", [64, 100, 1024])
def test_equals_the_slow_twin(head_size: int, window: int) -> None:
    """Same entries and codes."""
    for seed, noise in enumerate((0.0, 0.15, 0.3)):
        vectors = _clustered(257, head_size, 50, noise, seed)
        for threshold in (0.98, 0.95):
            expected = slow.windowed_cover(vectors, threshold, window)
            _assert_same(_cover(vectors, threshold, window), expected)


@pytest.mark.parametrize("capacity", [(1, 1, 9), (7, 60, 300), (60, 40, 120), (300, 300, 300)])
@pytest.mark.parametrize("chunk", [32, 128])
def test_admits_as_the_slow_twin(capacity: tuple[int, int, int], chunk: int) -> None:
    """The same tokens and codebooks by rank, with room for all and without."""
    for seed, noise in enumerate((0.0, 0.15, 0.3)):
        keys = _clustered(257, 64, 50, noise, seed)
        values = _clustered(257, 64, 30, noise, seed + 9).bfloat16()  # as the cache holds them
        ranked = torch.randperm(257, generator=torch.Generator().manual_seed(seed))
        case = (keys, values, ranked, (0.98, 0.95), capacity)
        expected = admit(*case, chunk=chunk)
        got = admit(*case, fast.CompiledBook, chunk=chunk)
        assert torch.equal(got.tokens, expected.tokens)
        assert got.num_refused == expected.num_refused
        _assert_same(got.keys, expected.keys)
        _assert_same(got.values, expected.values)


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
        assert len(_cover(pair, 0.98, 2).entries) == expected
        assert len(_cover(pair, 0.98, 1).entries) == expected  # by matching


def test_nearest_of_near_equals() -> None:
    """Matches go to the nearest entry even where bfloat16 cannot tell which that is."""
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(1, 64, generator=generator) + 0.05 * torch.randn(
        300, 64, generator=generator
    )
    books = [make(vectors, 0.9999, 20) for make in (slow.Book, fast.CompiledBook)]
    codes = []
    for book in books:
        book.add(torch.arange(20))
        book._threshold = 0.9  # whoever comes now finds many entries
        assert len(book.add(torch.arange(20, 300))) == 280
        codes.append(book.codes)
    assert torch.equal(*codes)
    assert len(set(codes[0].tolist())) > 10


def test_extremes() -> None:
    """Identical vectors need one entry, orthogonal ones an entry each, zero vectors none."""
    vector = torch.randn(1, 32)
    assert len(_cover(vector.expand(99, -1), 0.98, 10).entries) == 1
    assert len(_cover(torch.eye(32), 0.98, 10).entries) == 32
    mixed = torch.cat([torch.zeros(3, 32), vector, torch.zeros(2, 32)])
    _assert_same(_cover(mixed, 0.98, 2), slow.windowed_cover(mixed, 0.98, 2))
    nothing = torch.zeros(5, 32)
    _assert_same(_cover(nothing, 0.98, 2), slow.windowed_cover(nothing, 0.98, 2))
    assert len(_cover(torch.empty(0, 32), 0.98, 10).codes) == 0


def test_layer_is_its_heads() -> None:
    """``admit_layer`` gives every head what it would get alone."""
    keys, values = (
        torch.stack([_clustered(120, 32, 20, 0.2, seed + 5 * i) for seed in range(3)])
        for i in range(2)
    )
    ranked = torch.stack([torch.randperm(120) for _ in range(3)])
    capacity = (15, 12, 80)
    for head, got in enumerate(fast.admit_layer(keys, values, ranked, (0.95, 0.9), capacity)):
        expected = admit(keys[head], values[head], ranked[head], (0.95, 0.9), capacity)
        assert torch.equal(got.tokens, expected.tokens)
        _assert_same(got.keys, expected.keys)
        _assert_same(got.values, expected.values)
