"""Small host tensors to the device, so that nothing waits: neither the host nor what is queued."""

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, in stream order; the tensor itself if it is there already.

    From pinned memory, which torch keeps until the copy is done: a copy from pageable memory is
    what vLLM's own check for synchronisation (``VLLM_GPU_SYNC_CHECK``) calls one.
    """
    if host.device == device or device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
