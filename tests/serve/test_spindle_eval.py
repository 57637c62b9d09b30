"""``vllm-spindle eval --endpoint`` against a real server with the plugin.

Run with: pytest tests/serve/test_spindle_eval.py
"""

import json
from pathlib import Path

from vllm_spindle import cli
from vllm_spindle.serving.server import VllmServer


def test_a_served_model_is_measured(server: VllmServer, tmp_path: Path) -> None:
    """Full KV answers; a quarter of the bytes answers as many as full KV on one question last."""
    argv = ["eval", "--endpoint", server.url, "--model", server.model, "--budgets", "0.25"]
    argv += ["--tasks", "multikey_1", "--lengths", "512", "--num-questions", "12"]
    before = server.metrics().total("vllm:spindle_reductions_total")
    assert cli.main([*argv, "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "results.json").read_text())
    rows = {row["method"]: row["accuracy"]["percent"] for row in document["rows"]}
    assert rows["full"] >= 90
    assert rows["served"] >= rows["full"] - 10
    # Full KV is asked for with ratio 1: those requests are not reduced.
    assert server.metrics().total("vllm:spindle_reductions_total") == before + 12
