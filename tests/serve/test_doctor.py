"""`vllm-spindle doctor` against the installed vLLM: it agrees with what `vllm serve` would do.

Run with: pytest tests/serve/test_doctor.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The checks of several flag sets in one process: importing vLLM is what takes the time.
PROGRAM = """
import json, sys
from vllm_spindle.commands.doctor_serve import serve_checks
from vllm_spindle.config import SpindleConfig
for model, *flags in json.loads(sys.argv[1]):
    checks = serve_checks(model, flags, default=SpindleConfig(keep_ratio=0.25))
    print("CHECKS", json.dumps([[check.is_ok, check.finding] for check in checks]))
"""
NEEDLE = Path(__file__).parents[2] / "models" / "needle"


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        ([str(NEEDLE)], 0, ["are fine", "keep_ratio=0.25 budget=measured", "4-4 | 5-5"]),
        (
            [str(NEEDLE), "--kv-cache-dtype", "fp8", "--pipeline-parallel-size", "2"],
            1,
            [
                "--kv-cache-dtype=fp8",
                "--kv-cache-dtype auto",
                "leave --pipeline-parallel-size at 1",
            ],
        ),
    ],
    ids=["fine", "refused"],
)
def test_the_doctor_says_whether_and_why(arguments: list[str], code: int, parts: list[str]) -> None:
    """Exit code 0 and what would be on, or 1 and each reason with its way out."""
    done = subprocess.run(
        [sys.executable, "-m", "vllm_spindle.cli", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"COLUMNS": "300"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert [part for part in parts if part not in done.stdout] == []
    assert "Traceback" not in done.stdout + done.stderr


def test_what_cannot_even_be_configured_is_a_check_too() -> None:
    """A misspelt option, a model that is not there, an unknown flag: named, no traceback."""
    cases = {
        "did you mean 'keep_ratio'?": [
            str(NEEDLE),
            "--additional-config",
            '{"spindle": {"keep_ratoi": 0.5}}',
        ],
        "./no-such-model": ["./no-such-model"],
        "--no-such-flag": [str(NEEDLE), "--no-such-flag", "1"],
        "the engine is stock": [str(NEEDLE), "--additional-config", '{"spindle": {}}'],
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(list(cases.values()))],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("CHECKS ")]
    for part, line in zip(cases, lines, strict=True):
        ((is_ok, finding),) = json.loads(line.removeprefix("CHECKS "))
        assert part in finding
        assert is_ok == ("stock" in part)
