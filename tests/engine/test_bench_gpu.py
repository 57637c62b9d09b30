"""``vllm-spindle bench gpu`` in small on the CPU: that it runs and counts, not what it times."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine_child import ENVIRONMENT

pytestmark = pytest.mark.engine

CLI = "import sys; from vllm_spindle.cli import main; sys.exit(main(sys.argv[1:]))"


def _bench(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CLI, "bench", "gpu", "--tiny", *options],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT, "COLUMNS": "120"},
        timeout=300,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path: Path = tmp_path_factory.mktemp("bench") / "gpu.json"
    done = _bench("--sides", "stock,evict", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "requests running in the same memory" in done.stdout
    return json.loads(path.read_text())


def test_the_same_pool_holds_more(report: dict[str, Any]) -> None:
    """Both sides have the stated bytes; the plugin has three bands of blocks, and runs more."""
    stock, evict = (report["results"][side] for side in ("stock", "evict"))
    assert report["settings"]["kv_cache_bytes"] == 4 << 20
    assert evict["num_groups"] == 3 * stock["num_groups"]
    assert report["ratios"]["256"]["evict"]["capacity"] > 1.5
    bound = evict["contexts"]["256"]["bound"]
    assert bound["reductions"] >= bound["requests"]


def test_every_figure_is_there(report: dict[str, Any]) -> None:
    """Steps were decode steps, the profiler found the attention, and the kernel is right."""
    for side in report["results"].values():
        (context,) = side["contexts"].values()
        assert context["ample"]["decode_steps"] >= 10
        assert context["attention"]["seconds_per_step"] > 0
    assert all(ratio is not None for ratio in report["ratios"]["256"]["evict"].values())
    (kernel,) = report["kernels"]
    assert kernel["codebook_error"] < 2e-2 and "full_seconds" not in kernel
    (reduction,) = report["reductions"]
    assert reduction["score_error"] < 1e-5
    assert reduction["is_ranked"] and reduction["is_moved"]
    assert reduction["layer_seconds"] > 0 and reduction["prefill_share"] > 0


def test_results_of_a_side_that_broke_off_are_kept() -> None:
    """Ratios are of the contexts that both sides reached."""
    from vllm_spindle.bench.gpu import ratios

    part = {"peak_running": 2, "output_tokens_per_second": 6.0, "decode_step_seconds": None}
    whole = {name: part for name in ("bound", "ample", "single")}
    whole |= {"attention": {"seconds_per_step": 1.0}, "prefill_seconds": 4.0}
    results = {
        "stock": {"contexts": {"4096": whole, "32768": whole}},
        "evict": {"contexts": {"4096": {**whole, "prefill_seconds": 5.0}}, "failed": "memory"},
    }
    found = ratios(results, "4096")["evict"]
    assert found["prefill"] == 1.25 and found["capacity"] == 1 and found["decode_step"] is None
    assert ratios(results, "32768") == {}


def test_the_checks_run(tmp_path: Path) -> None:
    """``benchmarks/gpu_checks.py``, the shortest: kernels, requests aborted at any moment."""
    checks = Path(__file__).parents[2] / "benchmarks" / "gpu_checks.py"
    report = tmp_path / "checks.json"
    options = [
        "--eager",
        "--only",
        "reduction-kernels,aborts",
        "--num-requests",
        "40",
        "--json",
        str(report),
    ]
    done = subprocess.run(
        [sys.executable, str(checks), *options],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["reduction-kernels"]["score_error"] < 1e-5
    found = found["aborts"]
    assert found["ok"] and found["requests"] == 40 and found["aborted"] > 5


def test_an_unknown_side_is_refused() -> None:
    """By name, with what there is."""
    done = _bench("--sides", "stock,half")
    assert done.returncode == 2
    assert "'half' is none of stock, off, evict, whole" in done.stderr
