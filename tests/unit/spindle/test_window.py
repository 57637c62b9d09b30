"""The window's queries: staged by a forward that may be a graph, or taken by one that is none."""

import pytest
import torch
from torch import Tensor

from vllm_spindle.engine.step import WindowRows
from vllm_spindle.engine.window import WindowStash

LAYERS, HEADS, HEAD_SIZE = 2, 3, 4


def _queries(num_tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, num_tokens, HEADS, HEAD_SIZE, generator=generator)


def _step(stash: WindowStash, queries: Tensor, source: list[int], *counts: tuple[str, int]) -> None:
    stash.expect(WindowRows(torch.tensor(source), counts) if counts else None)
    for layer_idx, layer in enumerate(queries):
        stash.record(layer_idx, layer)
    stash.settle()


@pytest.mark.parametrize("staged_tokens", [0, 4, 64])
def test_each_request_reads_its_own_rows(staged_tokens: int) -> None:
    """In token order, over chunks, whatever may be a graph; what comes later changes nothing."""
    stash = WindowStash(LAYERS, HEADS, HEAD_SIZE, torch.float32, "cpu", staged_tokens)
    first, last, other = _queries(12, 1), _queries(2, 2), _queries(12, 3)
    _step(stash, first, [2, 3, 9, 10, 11], ("a", 2), ("b", 3))
    _step(stash, last, [1], ("b", 1))
    _step(stash, other, [])
    for layer_idx in range(LAYERS):
        torch.testing.assert_close(stash.read(layer_idx, "a"), first[layer_idx, 2:4])
        b = torch.cat([first[layer_idx, 9:12], last[layer_idx, 1:2]])
        torch.testing.assert_close(stash.read(layer_idx, "b"), b)
    stash.release("a")
    stash.release("a")
    assert stash.holders() == ["b"]


def test_a_replayed_graph_is_read() -> None:
    """The same copies into the same memory, and no Python: as a graph would run them."""
    stash = WindowStash(LAYERS, HEADS, HEAD_SIZE, torch.float32, "cpu", 8)
    inputs = torch.zeros(LAYERS, 8, HEADS, HEAD_SIZE)
    for layer_idx in range(LAYERS):  # the capture, outside of any step
        stash.record(layer_idx, inputs[layer_idx])
    address = stash._staged.data_ptr()
    now = _queries(8, 5)
    stash.expect(WindowRows(torch.tensor([6]), (("a", 1),)))
    stash._staged.copy_(now)  # the replay
    stash.settle()
    stash._staged.zero_()
    assert stash._staged.data_ptr() == address
    for layer_idx in range(LAYERS):
        torch.testing.assert_close(stash.read(layer_idx, "a"), now[layer_idx, 6:7])
