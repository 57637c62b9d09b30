"""The shipped pruning module behind `vllm serve`, measured over HTTP, says what transformers says.

Run with: pytest tests/serve/test_covipal_eval.py
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_covipal import cli
from vllm_spindle.serving.server import VllmServer

pytestmark = pytest.mark.serve

MODELS = Path(__file__).parents[2] / "models"
SHAPES, SHAPES_PPM = str(MODELS / "shapes"), str(MODELS / "shapes-ppm")
FLAGS = (
    "--dtype=float32",
    "--block-size=32",
    "--kv-cache-memory-bytes=33554432",
    "--max-model-len=256",
    "--max-num-seqs=8",
    "--enforce-eager",
)
NUM_QUESTIONS = 60
KEEP_RATIOS = ["0.25", "0.05"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """models/shapes with models/shapes-ppm; a request says how much it keeps."""
    options = {"covipal": {"selector": "ppm", "ppm": SHAPES_PPM}}
    flags = [*FLAGS, "--additional-config", json.dumps(options)]
    with VllmServer(SHAPES, flags, tmp_path_factory.mktemp("server") / "log") as running:
        yield running


def _rows(arguments: list[str], path: Path) -> dict[Any, list[float]]:
    """Right or wrong question by question, by keep ratio."""
    common = ["--num-questions", str(NUM_QUESTIONS), "--json", str(path), "--keep-ratio"]
    assert cli.main(["eval", *arguments, *common, *KEEP_RATIOS]) == 0
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {row["keep_ratio"]: row["rights"] for row in rows}


def test_the_server_answers_as_the_twin_does(server: VllmServer, tmp_path: Path) -> None:
    """Every question, at every ratio; at most one of sixty may round the other way."""
    served = _rows(["--endpoint", server.url, "--add-special-tokens"], tmp_path / "served.json")
    methods = ["--methods", "ppm", "--dtype", "float32", "--num-threads", "1"]
    local = _rows(["--model", SHAPES, "--ppm", SHAPES_PPM, *methods], tmp_path / "local.json")
    for keep_ratio in map(float, KEEP_RATIOS):
        pairs = zip(served[keep_ratio], local[keep_ratio], strict=True)
        assert sum(a != b for a, b in pairs) <= 1
        assert sum(served[keep_ratio]) > NUM_QUESTIONS / 2
    assert sum(served[1.0]) >= sum(served[0.05])
