"""One torch thread: the tests share a small machine. Hypothesis' profile is in pyproject.toml."""

from typing import Any

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay on one of pytest-xdist's workers, which keeps its engines' answers.

    All that start servers stay together: never two servers at a time.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "serve" if file.startswith("tests/serve/") else file

    return ByFile(config, log)
