"""The real `vllm serve` command line stops at start-up where spindle cannot work.

Run with: pytest tests/serve/test_refusals.py
"""

import json
import time
from pathlib import Path

import pytest

from vllm_spindle.serving.server import log_tail, start_vllm_serve, stop_group

NEEDLE = Path(__file__).parents[2] / "models" / "needle"
SPECULATIVE = '{"method": "ngram", "num_speculative_tokens": 2}'

WRONG_KEY = "spindle: unknown key 'keepratio'; did you mean 'keep_ratio'?"
WRONG_FLAGS = (
    "spindle does not support --kv-cache-dtype=fp8: quantised keys cannot be scored yet; "
    "use --kv-cache-dtype auto\n"
    "spindle does not support --speculative-config=ngram: drafts would read and extend a "
    "reduced cache; remove it"
)


@pytest.mark.parametrize(
    ("spindle", "flags", "message"),
    [
        (
            {"keepratio": 0.25},
            [],
            WRONG_KEY,
        ),
        (
            {"keep_ratio": 0.25},
            ["--kv-cache-dtype", "fp8", "--speculative-config", SPECULATIVE],
            WRONG_FLAGS,
        ),
    ],
    ids=["wrong key", "wrong flags"],
)
def test_start_up_is_refused(
    tmp_path: Path, spindle: dict[str, object], flags: list[str], message: str
) -> None:
    """It exits with an error, and the last thing it says is our message, every reason in it."""
    additional = json.dumps({"spindle": spindle})
    process, log = start_vllm_serve(
        str(NEEDLE), ["--additional-config", additional, *flags], tmp_path / "log"
    )
    try:
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.5)
        assert process.returncode not in (None, 0)
    finally:
        stop_group(process)
        log.close()
    said = log_tail(tmp_path / "log", 1 + message.count("\n"))
    assert said.removeprefix("ValueError: ") == message
