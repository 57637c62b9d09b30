"""The reduction of the step that this worker is executing.

vLLM gives attention builders and implementations no handle on their worker, so the worker leaves
its step here for the time of ``execute_model``. Outside of it (profiling, warm-up, dummy
batches) there is none, and the backend behaves as stock.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from vllm_spindle.engine.decoders import Decoder
from vllm_spindle.engine.step import Step
from vllm_spindle.engine.window import WindowStash


class ActiveReduction(Protocol):
    """What builders and implementations may ask."""

    @property
    def step(self) -> Step:
        """The step's geometry, planned on first use: after the batch is updated."""

    @property
    def stash(self) -> WindowStash:
        """Where the window's queries go."""

    def decoder(self, layer_idx: int) -> Decoder:
        """The compiled kernel that reads a layer's codebooks."""


_active: ActiveReduction | None = None


def active_reduction() -> ActiveReduction | None:
    """The reduction of the running step; None outside of one."""
    return _active


@contextmanager
def activate(reduction: ActiveReduction) -> Iterator[None]:
    """Make a reduction the active one for the duration of the block.

    Blocks nest: vLLM's warm-up executes steps of its own before it captures.
    """
    global _active
    before, _active = _active, reduction
    try:
        yield
    finally:
        _active = before
