"""Model runner V2 on a CPU: its Triton kernels through Triton's interpreter, host logic as it is.

Called in a fresh process before anything of vLLM is imported, with ``ENVIRONMENT`` set. The tokens
are V1's; top-k and top-p are left out, as the interpreter cannot run vLLM's kernel for them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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


@contextmanager
def triton_attention() -> Iterator[None]:
    """Engines made inside run vLLM's Triton attention, as on a GPU, and ours over codebooks.

    Slow, for prompts of a few dozen tokens; not in bfloat16, of which the interpreter multiplies
    the bits, so that codebooks are let in with float16, as on CUDA.
    """
    from unittest.mock import patch

    import torch
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_spindle.engine import platforms

    def choose(*args: Any, **kwargs: Any) -> str:
        return AttentionBackendEnum.TRITON_ATTN.get_path()

    selector._cached_get_attn_backend.cache_clear()
    with (
        patch.object(CpuPlatform, "get_attn_backend_cls", choose),
        patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        patch.object(
            platforms, "CPU", replace(platforms.CPU, codebook_dtypes=platforms.CUDA.codebook_dtypes)
        ),
    ):
        yield
    selector._cached_get_attn_backend.cache_clear()
