"""The parent's end of a benchmark's sides: one child process each, all alive, one at work.

All at once in memory, so that a round asks each in turn for a request and a machine that slows
down hits every side alike.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

LOG_LINES = 30


class SideProcess:
    """A child that runs ``vllm_covipal.bench.side``."""

    def __init__(
        self, name: str, engine: dict[str, Any], num_threads: int, *, is_stock: bool
    ) -> None:
        """Start it; ``wait`` before the first task. A stock side loads no plugin at all."""
        self._name = name
        self._log: list[str] = []
        self._child = subprocess.Popen(
            [sys.executable, "-m", "vllm_covipal.bench.side"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                "VLLM_LOGGING_LEVEL": "WARNING",
                **os.environ,
                **({"VLLM_PLUGINS": ""} if is_stock else {}),
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_NO_USAGE_STATS": "1",
                "OMP_NUM_THREADS": str(num_threads),
            },
        )
        self._send(engine)

    def wait(self) -> dict[str, Any]:
        """The answer to what was sent last.

        Raises:
            RuntimeError: if the child ended instead, with the end of its log.
        """
        assert self._child.stdout is not None
        for line in self._child.stdout:
            word, _, rest = line.partition(" ")
            if word == "result":
                return json.loads(rest)  # type: ignore[no-any-return]
            self._log = [*self._log[-LOG_LINES:], line]
        raise RuntimeError(f"the {self._name} side failed:\n{''.join(self._log)}")

    def measure(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Let the child do a task. Raises as ``wait``."""
        self._send(task)
        return self.wait()

    def stop(self) -> None:
        """End the child: politely, then not."""
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.close()
        try:
            self._child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            self.wait()  # says why it ended


@contextmanager
def running(
    engines: Mapping[str, dict[str, Any]], num_threads: int, stock: str
) -> Iterator[dict[str, SideProcess]]:
    """Start a side per engine, one after the other, and end them all on leaving.

    Args:
        engines: name of the side -> arguments of ``LLM``.
        num_threads: of each side.
        stock: name of the side that loads no plugin.
    """
    with ExitStack() as stack:
        sides = {}
        for name, engine in engines.items():
            sides[name] = SideProcess(name, engine, num_threads, is_stock=name == stock)
            stack.callback(sides[name].stop)
            sides[name].wait()
        yield sides
