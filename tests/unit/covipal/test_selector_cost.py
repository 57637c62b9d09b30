"""What choosing costs on a CPU: it must be small beside the encoder and the prefill it saves."""

import time

import pytest
import torch

from vllm_covipal.core.pruner import PruningModule, PruningModuleConfig
from vllm_covipal.core.visual_item import VisualItem
from vllm_covipal.selectors import SELECTOR_NAMES, build_selector

ALLOWED_SECONDS = 0.042
"""5 % of encode and prefill of 576 tokens, 12 layers of 1,024, on one thread: 0.85 s."""


@pytest.mark.parametrize("name", SELECTOR_NAMES)
def test_choosing_takes_a_twentieth_of_encode_and_prefill(name: str) -> None:
    """144 of 576 rows of width 1,024 for 64 text tokens, one thread, the best of several runs."""
    torch.manual_seed(0)
    module = PruningModule(PruningModuleConfig.for_hidden_size(1024)).eval()
    selector = build_selector(name, pruning_module=module)
    item = VisualItem(torch.randn(576, 1024), torch.randn(64, 1024), None, ((24, 24),), 144)
    seconds = []
    for _ in range(15):
        start = time.perf_counter()
        selector.select([item])
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < ALLOWED_SECONDS
