"""PyramidKV (arXiv:2406.02069): SnapKV's choice, fewer tokens the deeper the layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from vllm_spindle.baselines.base import PromptLayer, share_tokens
from vllm_spindle.baselines.snapkv import PoolName, SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Context budgets in arithmetic progression: last ``c / beta``, first ``2 c - c / beta``.

    c is the mean context budget, what is left of a layer's share beside the window. Where the
    first layer would need more than the context, it keeps all of it and the last ``2 c - context``;
    where c is more than half of the context, all layers are alike, as in the release. Window 8 and
    beta 20 are the paper's, a maximum over 7 its LongBench runner's.

    GQA: see ``SnapKV``.
    """

    num_recent: int = 8
    pool_kernel: int = 7
    pool: PoolName = "max"
    beta: int = 20

    def layer_budgets(self, layers: Sequence[PromptLayer], total: int) -> list[int]:
        num_layers, num_tokens = len(layers), layers[0].num_tokens
        window, context = self.num_recent, num_tokens - self.num_recent
        mean = Fraction(total, num_layers) - window
        if mean <= 0 or num_layers == 1 or num_tokens < 2 * mean:
            return super().layer_budgets(layers, total)
        last = mean / self.beta
        first = 2 * mean - last
        if first > context:
            first, last = Fraction(context), 2 * mean - context
        step = (first - last) / (num_layers - 1)
        budgets = [window + first - step * i for i in range(num_layers)]
        return share_tokens(budgets, total, num_tokens)
