"""Small host tensors to the device, so that nothing waits: neither the host nor what is queued."""

from contextlib import suppress

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, in stream order; the tensor itself if it is there already.

    From pinned memory where there is any, which torch keeps until the copy is done: a copy from
    pageable memory is what vLLM's check for synchronisation (``VLLM_GPU_SYNC_CHECK``) calls one.
    """
    if host.device == device or device.type == "cpu":
        return host
    with suppress(RuntimeError):  # torch has none here, or, as on some WSL, no more of it
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
