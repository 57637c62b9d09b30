"""Small host tensors to the device, so that nothing waits: neither the host nor what is queued."""

import torch
from torch import Tensor
from vllm.utils.platform_utils import is_pin_memory_available


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, in stream order; the tensor itself if it is there already.

    From pinned memory where there is any, which torch keeps until the copy is done: a copy from
    pageable memory is what vLLM's check for synchronisation (``VLLM_GPU_SYNC_CHECK``) calls one.
    """
    if host.device == device or device.type == "cpu":
        return host
    pinned = host.pin_memory() if is_pin_memory_available() else host
    return pinned.to(device, non_blocking=True)
