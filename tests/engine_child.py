"""Run a function of a test file in a child process with its own vLLM: JSON in, JSON out.

A crash of the engine is one failed test, and no engine's state leaks into the next. The function
is found again in the child by file and name; it imports vLLM inside its body, so that collecting
tests stays cheap. Children are forked from a process that has imported vLLM and made no engine:
importing it takes most of a short scenario's time.
"""

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from inspect import getfile
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

TESTS = Path(__file__).parent
TIMEOUT_SECONDS = 1500  # of a slow machine with other work on it
REPORTED_CHARACTERS = 4000
PRELOADED = ("vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker")

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
    scenario: Callable[..., Any],
    *,
    env: dict[str, str] | None = None,
    imports_vllm_itself: bool = False,
    **kwargs: Any,
) -> Any:
    """What ``scenario(**kwargs)`` returns in a process of its own; both must be JSON.

    Args:
        scenario: a module-level function of a file that can be imported without vLLM.
        env: environment variables on top of ``ENVIRONMENT``.
        imports_vllm_itself: start from nothing: ``env`` or the scenario change what is imported.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.json"
        found = {"file": getfile(scenario), "name": scenario.__name__, "kwargs": kwargs}
        task.write_text(json.dumps(found))
        start = _spawned if imports_vllm_itself else _forked
        returncode = start(task, env or {})
        result, output = task.with_name("result.json"), task.with_name("output.txt")
        assert returncode == 0 and result.exists(), (
            f"{scenario.__name__} ended with {returncode}:\n"
            f"{output.read_text(errors='replace')[-REPORTED_CHARACTERS:]}"
        )
        return json.loads(result.read_text())


def _forked(task: Path, env: dict[str, str]) -> int | None:
    """Exit status of a child that has vLLM already; ``None`` if it did not end in time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with mock.patch.dict(os.environ, ENVIRONMENT):  # parts of vLLM read it as they are imported
        forkserver.ensure_running()
    child = context.Process(target=_perform, args=(str(task), {**os.environ, **ENVIRONMENT, **env}))
    child.start()
    try:
        child.join(TIMEOUT_SECONDS)
        return child.exitcode
    finally:
        _end_session(child.pid)


def _spawned(task: Path, env: dict[str, str]) -> int | None:
    """Exit status of a child that starts with nothing; ``None`` if it did not end in time."""
    python_path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    child = subprocess.Popen(
        [sys.executable, __file__, str(task)],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": python_path, **env},
    )
    try:
        return child.wait(TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end_session(child.pid)
        child.wait()


def _end_session(leader: int | None) -> None:
    """Kill what is left of a child and of the workers that it started."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _perform(task_file: str, env: dict[str, str]) -> None:
    """The child's side: output into a file, answer into another."""
    os.setsid()  # one kill for it and its workers
    os.environ.clear()
    os.environ.update(env)
    task = Path(task_file)
    os.chdir(task.parent)
    with task.with_name("output.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    found = json.loads(task.read_text())
    spec = importlib.util.spec_from_file_location("scenario", found["file"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    answer = getattr(module, found["name"])(**found["kwargs"])
    task.with_name("result.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    _perform(sys.argv[1], dict(os.environ))
