"""``vllm-spindle eval --endpoint``, against a server of a few lines that remembers."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vllm_spindle import cli
from vllm_spindle.evaluation import needle

NEEDLE = str(Path(__file__).parents[3] / "models" / "needle")


class Server(ThreadingHTTPServer):
    """Answers word questions from their prompts; at low ratios it forgets."""

    metrics = "vllm:spindle_reductions_total 0\n"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict] = []


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def do_GET(self) -> None:
        """The models, the metrics."""
        models = json.dumps({"data": [{"id": "words"}]})
        self._reply(self.server.metrics if self.path == "/metrics" else models)

    def do_POST(self) -> None:
        """A completion."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        words = body["prompt"].split()
        key = words[-3:-1]
        said = next(
            words[i + 3 : i + 6] for i in range(len(words)) if words[i : i + 3] == [*key, needle.IS]
        )
        if body["vllm_xargs"]["spindle_keep_ratio"] < 0.3:
            said = said[:2]
        self._reply(json.dumps({"choices": [{"text": " ".join(said)}]}))

    def _reply(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    """Listening until the test ends."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def _run(server: Server, out: Path) -> int:
    argv = ["eval", "--endpoint", f"http://127.0.0.1:{server.server_port}", "--model", NEEDLE]
    argv += ["--budgets", "0.5,0.25", "--tasks", "multikey_1", "--lengths", "300"]
    return cli.main([*argv, "--num-questions", "3", "--out", str(out)])


def test_each_request_has_its_own_ratio(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same prompts at every ratio, each ratio in its own requests; the figures hold."""
    assert _run(server, tmp_path) == 0
    rows = {
        (row["method"], row["budget"]): row["accuracy"]["percent"]
        for row in json.loads((tmp_path / "results.json").read_text())["rows"]
    }
    assert rows == {("full", 1.0): 100.0, ("served", 0.5): 100.0, ("served", 0.25): 0.0}
    by_ratio: dict[float, set[str]] = {}
    for body in server.bodies:
        assert (body["model"], body["temperature"]) == ("words", 0)
        by_ratio.setdefault(body["vllm_xargs"]["spindle_keep_ratio"], set()).add(body["prompt"])
    assert set(by_ratio) == {1.0, 0.5, 0.25}
    assert by_ratio[1.0] == by_ratio[0.5] == by_ratio[0.25]
    assert len(by_ratio[1.0]) == 3
    assert "warning" not in capsys.readouterr().err


def test_a_server_without_the_plugin_is_pointed_out(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stock vLLM takes the ratio and ignores it: that is said."""
    server.metrics = "vllm:num_requests_running 0\n"
    assert _run(server, tmp_path) == 0
    assert "budgets are ignored" in capsys.readouterr().err
