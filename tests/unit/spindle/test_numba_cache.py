"""Compiled kernels where nothing can be written: a container with a read-only file system."""

import os
import subprocess
import sys

import pytest

from vllm_spindle.kernels.decode import HAS_BF16_PRODUCTS

# The one place that numba is told to look at is for notebooks: no file of ours has one.
NOWHERE = {"NUMBA_CACHE_LOCATOR_CLASSES": "IPythonCacheLocator"}
SCORES = """
import torch
from numba import njit
from vllm_spindle.core.scoring import Questions
from vllm_spindle.kernels.host_scoring import host_keys

try:
    njit(cache=True)(host_keys)
except RuntimeError as error:
    print("no locator" in str(error))
torch.manual_seed(0)
queries, keys = torch.randn(1, 2, 4, 16).bfloat16(), torch.randn(1, 9, 16).bfloat16()
[summed] = host_keys(keys).answer(queries, torch.arange(5, 9), 0.25, Questions(range(4)))
print(summed.shape, round(float(summed.sum()), 4))
"""


@pytest.mark.skipif(not HAS_BF16_PRODUCTS, reason="needs AVX512_BF16")
def test_kernels_work_where_no_code_can_be_kept() -> None:
    """Numba itself finds no place; the kernel is compiled all the same, and right."""
    child = subprocess.run(
        [sys.executable, "-c", SCORES],
        env={**os.environ, **NOWHERE},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines() == ["True", "torch.Size([1, 2, 9]) 8.0"]
