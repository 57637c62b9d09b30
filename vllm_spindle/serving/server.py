"""A ``vllm serve`` child process on a free local port, stopped by the process group we started."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import httpx
from typing_extensions import Self

from vllm_spindle.serving.metrics import Metrics

POLL_SECONDS = 0.5
STOP_SECONDS = 30.0


class VllmServer:
    """One server; a context manager that starts it, waits for it and stops it.

    Attributes:
        model: as given; also the name to ask for over HTTP.
        url: address, without a path.
        log_path: where the process writes everything it says.
    """

    def __init__(
        self,
        model: str,
        flags: Sequence[str],
        log_path: Path,
        *,
        start_seconds: float = 300.0,
        on_wait: Callable[[float, str], None] = lambda seconds, line: None,
    ) -> None:
        """Nothing is started yet.

        Args:
            model: folder or name.
            flags: of ``vllm serve``; host and port are ours.
            log_path: file to write.
            start_seconds: patience with the start.
            on_wait: called while it starts, with the seconds so far and the log's last line.
        """
        self.model = model
        self.log_path = log_path
        self._port = _free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._flags = flags
        self._start_seconds = start_seconds
        self._on_wait = on_wait
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._client = httpx.Client(base_url=self.url, timeout=60)

    def __enter__(self) -> Self:
        """Start, and return once requests are served.

        Raises:
            RuntimeError: if it ends or is not ready in time, with the end of its log.
        """
        self._process, self._log = start_vllm_serve(
            self.model,
            ["--host", "127.0.0.1", "--port", str(self._port), *self._flags],
            self.log_path,
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the process and everything it started; safe to call again."""
        if self._process is not None:
            stop_group(self._process)
            self._process = None
        if self._log is not None:
            self._log.close()
        self._client.close()

    def metrics(self) -> Metrics:
        """What ``/metrics`` says now."""
        return Metrics.parse(self._client.get("/metrics").raise_for_status().text)

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        start = time.monotonic()
        while (seconds := time.monotonic() - start) < self._start_seconds:
            if self._process.poll() is not None:
                raise RuntimeError(
                    f"vllm serve ended with status {self._process.returncode} before it was "
                    f"ready; the end of its log ({self.log_path}):\n{log_tail(self.log_path)}"
                )
            with contextlib.suppress(httpx.HTTPError):
                if self._client.get("/health", timeout=5).status_code == 200:
                    return
            self._on_wait(seconds, log_tail(self.log_path, 1))
            time.sleep(POLL_SECONDS)
        raise RuntimeError(
            f"vllm serve was not ready after {self._start_seconds:.0f} s; the end of its log "
            f"({self.log_path}):\n{log_tail(self.log_path)}"
        )


def start_vllm_serve(
    model: str, flags: Sequence[str], log_path: Path
) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    """Start ``vllm serve`` of this very environment in a session of its own, log to a file.

    Its own session: Ctrl-C in the terminal reaches us alone, and its workers share its group.
    """
    log = log_path.open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *flags],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    return process, log


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that we started, politely, then what is left of its group."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def log_tail(path: Path, num_lines: int = 20) -> str:
    """Last lines of a log that hold anything."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([line for line in lines if line.strip()][-num_lines:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
