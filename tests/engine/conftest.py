"""The random-weight models of the engine tests, written once a session."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six layers (three bands of two), eight query heads on two kv heads."""
    # Imports transformers, so not at collection.
    import tiny

    return str(tiny.write_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="session")
def thin_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three layers (three bands), four query heads on two kv heads: for many requests."""
    import tiny

    folder: Path = tmp_path_factory.mktemp("thin-llama")
    return str(tiny.write_llama(folder, num_layers=3, num_heads=4))


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two layers (two bands), four query heads on two kv heads: where counts matter, not values."""
    import tiny

    folder: Path = tmp_path_factory.mktemp("small-llama")
    return str(tiny.write_llama(folder, num_layers=2, num_heads=4, max_len=2048))
