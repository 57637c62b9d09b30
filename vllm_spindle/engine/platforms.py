"""What spindle brings for each of vLLM's platforms, and what it leans on there."""

from dataclasses import dataclass

import torch
from vllm.platforms import current_platform


@dataclass(frozen=True)
class Target:
    """One platform.

    Attributes:
        worker: our worker class.
        stock_worker: the one that it stands in for.
        backends: vLLM's attention backends that ours are derived from, by name; the first one is
            vLLM's own choice.
        codebook_dtypes: of the model, where a band has codebooks.
    """

    worker: str
    stock_worker: str
    backends: tuple[str, ...]
    codebook_dtypes: tuple[torch.dtype, ...]


CPU = Target(
    worker="vllm_spindle.processes.worker_cpu.SpindleCPUWorker",
    stock_worker="vllm.v1.worker.cpu_worker.CPUWorker",
    # The second is vLLM's choice nowhere; tests interpret it.
    backends=("CPU_ATTN", "TRITON_ATTN"),
    codebook_dtypes=(torch.bfloat16,),
)
CUDA = Target(
    worker="vllm_spindle.processes.worker_cuda.SpindleGPUWorker",
    stock_worker="vllm.v1.worker.gpu_worker.Worker",
    backends=("FLASH_ATTN", "TRITON_ATTN"),
    codebook_dtypes=(torch.bfloat16, torch.float16),
)


def target() -> Target | None:
    """This machine's; None where there is none."""
    if current_platform.is_cpu():
        return CPU
    return CUDA if current_platform.is_cuda() else None
