"""Ada-KV (arXiv:2407.11550): SnapKV's scores, and a layer's heads compete for its budget."""

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from vllm_spindle.baselines.snapkv import PoolName, SnapKV
from vllm_spindle.core.budget import share_out


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """Each head holds what it has among the layer's top tokens, and a floor.

    The K * c best of all (head, token) pairs are counted per head, c being a head's mean context
    budget; head h keeps ``(1 - floor) count_h + floor * c`` of its own best. Window 32, a maximum
    over 7; floor 0.2, which the release suggests under GQA (0.5 without).

    GQA: heads are kv heads, scored by the mean of their group. Rows are charged as they are held,
    and 4 bytes per head for its length; there is no padding to the longest head.

    Attributes:
        floor_ratio: share of the mean budget that no head goes below.
    """

    pool_kernel: int = 7
    pool: PoolName = "max"
    floor_ratio: float = 0.2

    def head_budgets(self, scores: Tensor, num_kept: int) -> list[int] | None:
        num_kv_heads, num_context = scores.shape
        if num_kept in (0, num_context):
            return None  # nothing to compete for
        # The lengths beside the rows take the place of one row.
        total = num_kv_heads * num_kept - 1
        best = torch.topk(scores.flatten(), total).indices // num_context
        counts = torch.bincount(best, minlength=num_kv_heads).tolist()
        floor = Fraction(str(self.floor_ratio))
        quotas = [(1 - floor) * count + floor * Fraction(total, num_kv_heads) for count in counts]
        return share_out(quotas, total, floor=0, cap=num_context)
