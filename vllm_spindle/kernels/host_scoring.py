"""Attention that a prompt's tokens receive, on the CPU: torch tensors in, compiled kernel.

Shapes: K kv heads, G query heads per kv head, Q observed queries, T prompt tokens, D head size.
"""

from dataclasses import dataclass

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_spindle.core.scoring import MIN_DISTANCE, CachedKeys, Questions
from vllm_spindle.kernels.decode import HAS_BF16_PRODUCTS
from vllm_spindle.kernels.numba_products import ROWS, STRIP
from vllm_spindle.kernels.numba_scoring import receive_parallel, receive_serial
from vllm_spindle.kernels.numba_softmax import LOG2_E


@dataclass(frozen=True)
class HostKeys:
    """Keys of one prompt in one layer, on the CPU.

    Attributes:
        pairs: two bf16 each, transposed, zeros behind the last token. [K, D / 2, P], int32.
        num_tokens: T.
    """

    pairs: Tensor
    num_tokens: int

    def answer(
        self, queries: Tensor, positions: Tensor, scale: float, questions: Questions
    ) -> tuple[Tensor, ...]:
        """As ``core.scoring.answer`` has it, up to the order of float32 sums.

        Raises:
            ValueError: if the queries are not bfloat16, or do not fit the keys.
        """
        heads, num_pairs = len(self.pairs), self.pairs.shape[1]
        if queries.dtype != torch.bfloat16 or queries.shape[::3] != (heads, 2 * num_pairs):
            raise ValueError(
                f"keys of {heads} heads, {2 * num_pairs} bfloat16 each, got queries "
                f"{tuple(queries.shape)} of {queries.dtype}"
            )
        num_kv_heads, group, num_queries, _ = queries.shape
        maps = torch.zeros(3, num_kv_heads, group, self.num_tokens)
        missing = max(0, ROWS - num_queries)
        if missing:
            # As many as a pass takes: copies of the first one, which nobody asks.
            queries = torch.cat([queries[:, :, :1].expand(-1, -1, missing, -1), queries], dim=2)
            positions = torch.cat([positions[:1].expand(missing), positions])
        window, last_first = questions.window, questions.last_first
        arguments = (
            maps.numpy(),
            queries.contiguous().view(torch.int32).numpy(),
            self.pairs.numpy(),
            positions.numpy(),
            np.float32(scale) * LOG2_E,
            window.start + missing,
            window.stop + missing,
            missing + (num_queries if last_first is None else last_first),
            MIN_DISTANCE if questions.from_afar else -1,
        )
        num_threads = torch.get_num_threads()
        if num_threads == 1:
            receive_serial(*arguments)
        else:
            numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
            receive_parallel(*arguments)
        asked = (last_first is not None, True, questions.from_afar)
        return tuple(each for each, wanted in zip(maps.unbind(), asked, strict=True) if wanted)


def host_keys(keys: Tensor) -> Tensor | CachedKeys:
    """What scores these keys: the kernel for bfloat16 on the CPU, else torch, the keys as they are.

    Args:
        keys: rotated. [K, T, D].
    """
    is_kernels = keys.dtype == torch.bfloat16 and keys.device.type == "cpu" and HAS_BF16_PRODUCTS
    if not is_kernels or keys.shape[2] % 2:
        return keys
    num_tokens = keys.shape[1]
    pairs = keys.contiguous().view(torch.int32).transpose(1, 2)
    return HostKeys(F.pad(pairs, (0, -num_tokens % STRIP)).contiguous(), num_tokens)
