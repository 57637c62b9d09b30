"""Run a function of a test file in a child process with its own vLLM: JSON in, JSON out.

A crash of the engine is one failed test, and no engine's state leaks into the next. The function
is found again in the child by file and name; it imports vLLM inside its body, so that collecting
tests stays cheap.
"""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
TIMEOUT_SECONDS = 1500  # of a slow machine with other work on it
REPORTED_CHARACTERS = 4000

ENVIRONMENT = {
    # The engine core in the child itself: tests look at its scheduler and block pool.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    # The host of torch.distributed's rendezvous; machines without a network have no other.
    "VLLM_HOST_IP": "127.0.0.1",
}


def in_child(
    scenario: Callable[..., Any], *, env: dict[str, str] | None = None, **kwargs: Any
) -> Any:
    """What ``scenario(**kwargs)`` returns in a fresh process; both must be JSON.

    Args:
        scenario: a module-level function of a file that can be imported without vLLM.
        env: environment variables on top of ``ENVIRONMENT``.
    """
    python_path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, inspect.getfile(scenario), scenario.__name__]
        child = subprocess.Popen(
            [*command, str(result)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": python_path, **(env or {})},
        )
        try:
            output, _ = child.communicate(json.dumps(kwargs), timeout=TIMEOUT_SECONDS)
        finally:
            child.kill()
        assert child.returncode == 0 and result.exists(), (
            f"{scenario.__name__} ended with {child.returncode}:\n{output[-REPORTED_CHARACTERS:]}"
        )
        return json.loads(result.read_text())


def main(file: str, name: str, result: str) -> None:
    """The child's side."""
    spec = importlib.util.spec_from_file_location("scenario", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    answer = getattr(module, name)(**json.load(sys.stdin))
    Path(result).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
