"""Servers of the needle model, each started when a test first asks for it."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vllm_spindle.serving.server import VllmServer

ROOT = Path(__file__).parents[2]
NEEDLE = ROOT / "models" / "needle"
# The needle model has none of its own: the messages' texts, one after the other.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
# In 16 MiB fit ten whole prompts of 1,024 tokens.
FLAGS = (
    "--block-size=32",
    "--kv-cache-memory-bytes=16777216",
    "--max-model-len=2048",
    "--max-num-seqs=64",
    "--enforce-eager",
    f"--chat-template={CHAT_TEMPLATE}",
)

Start = Callable[..., VllmServer]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder starts `vllm serve`."""
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.serve)


@pytest.fixture(scope="session", autouse=True)
def _environment() -> Iterator[None]:
    """What the Makefile sets, for a bare pytest too; the servers inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        if os.cpu_count() in (1, 2):
            patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def make_server(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """A server of the needle model, not yet started, from the value of "spindle"."""

    def make(spindle: object) -> VllmServer:
        log = tmp_path_factory.mktemp("server") / "log"
        flags = [*FLAGS, "--additional-config", json.dumps({"spindle": spindle})]
        return VllmServer(str(NEEDLE), flags, log)

    return make


@pytest.fixture(scope="session")
def server(make_server: Start) -> Iterator[VllmServer]:
    """Spindle at keep 0.25, from a YAML file that ``--additional-config`` names."""
    with make_server(str(ROOT / "configs" / "spindle" / "evict_25.yaml")) as running:
        yield running
