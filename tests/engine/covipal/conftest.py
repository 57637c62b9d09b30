"""The random-weight vision-language models of the engine tests, written once a session."""

from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def lvlm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Family -> folder of its model."""
    folders: dict[str, str] = {}

    def folder(family: str) -> str:
        if family not in folders:
            import tiny_lvlm  # imports transformers, so not at collection

            folders[family] = str(tiny_lvlm.write(family, tmp_path_factory.mktemp(family)))
        return folders[family]

    return folder
