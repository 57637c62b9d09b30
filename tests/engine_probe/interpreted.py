"""Model runner V2 on a CPU: its Triton kernels through Triton's interpreter, host logic as it is.

Called in a fresh process before anything of vLLM is imported, with ``ENVIRONMENT`` set. The tokens
are V1's; top-k and top-p are left out, as the interpreter cannot run vLLM's kernel for them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

ENVIRONMENT = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}


def enable() -> None:
    """Let vLLM see a Triton that serves CPUs. It asks for the name of the backend alone."""
    from triton.backends import backends

    driver = SimpleNamespace(is_active=lambda: True)
    backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)


@contextmanager
def async_scheduling() -> Iterator[None]:
    """Engines made inside schedule a step ahead, which vLLM's CPU platform switches off."""
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config

    def check(vllm_config: Any) -> None:
        stock(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = staticmethod(check)
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = stock
