"""CUDA graphs on a CPU as a list of torch's operations with the tensors of their capture.

For PIECEWISE graphs: vLLM's own capture and replay of the pieces between the attention calls, with
``torch.cuda.CUDAGraph`` replaced. A replay runs the recorded operations again on the recorded
tensors and copies what they return into the recorded outputs; no Python of the piece runs. After a
forward all these are zero but its result, as graphs share their memory: whoever kept a tensor of a
piece instead of a copy has nothing.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BREAKABLE = "VLLM_USE_BREAKABLE_CUDAGRAPH"
"""Read as vLLM's attention is imported: 1 from the start where either kind of pieces is to run."""


class RecordedGraph:
    """In place of ``torch.cuda.CUDAGraph``."""

    recording: "RecordedGraph | None" = None
    made: list[torch.Tensor] = []  # noqa: RUF012
    """Of all graphs, since a forward began."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def capture_begin(self, pool: Any = None) -> None:
        """What runs from now on is recorded; one graph at a time."""
        assert RecordedGraph.recording is None
        RecordedGraph.recording = self

    def capture_end(self) -> None:
        """Recorded."""
        assert RecordedGraph.recording is self
        RecordedGraph.recording = None

    def replay(self) -> None:
        """The operations again."""
        for call, args, kwargs, outputs in self.calls:
            again = call(*args, **kwargs)
            for old, new in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
                    RecordedGraph.made.append(old)


class _Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        graph = RecordedGraph.recording
        outputs = call(*args, **(kwargs or {}))
        # Another graph by now: an operation that is not captured, attention, broke the first.
        if graph is not None and graph is RecordedGraph.recording:
            graph.calls.append((call, args, kwargs or {}, outputs))
        return outputs


@contextmanager
def _graph(graph: RecordedGraph, pool: Any = None, stream: Any = None) -> Iterator[None]:
    graph.capture_begin(pool)
    try:
        yield
    finally:
        graph.capture_end()


@contextmanager
def recording() -> Iterator[None]:
    """Captures inside are recorded."""
    with _Recorder():
        yield


@contextmanager
def pieces(runs: Counter, *, is_compiled: bool) -> Iterator[None]:
    """Engines made inside can have PIECEWISE graphs.

    Args:
        runs: how often each kind of forward ran in pieces, by its tokens with padding.
        is_compiled: pieces as ``torch.compile`` splits them; else where attention breaks a capture.
    """
    from vllm.compilation import breakable_cudagraph
    from vllm.config.compilation import CompilationMode, CUDAGraphMode
    from vllm.platforms.cpu import CpuPlatform
    from vllm.utils import torch_utils
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    check, run = CpuPlatform.check_and_update_config, CudaGraphManager.run_pw_graph

    def keep_pieces(vllm_config: Any) -> None:
        """The CPU's platform compiles a model as a whole."""
        asked = vllm_config.compilation_config.mode
        check(vllm_config)
        config = vllm_config.compilation_config
        if asked == CompilationMode.VLLM_COMPILE:
            config.mode, config.backend = asked, "eager"
        config.cudagraph_mode = CUDAGraphMode.PIECEWISE  # so that pieces are wrapped

    def run_pieces(manager: Any, model: Any, inputs: dict[str, Any]) -> Any:
        tokens = inputs["input_ids"] if inputs["input_ids"] is not None else inputs["inputs_embeds"]
        runs[f"{len(tokens)} in pieces"] += 1
        RecordedGraph.made.clear()
        result = run(manager, model, inputs)
        kept = result.untyped_storage().data_ptr()
        for tensor in RecordedGraph.made:
            if tensor.untyped_storage().data_ptr() != kept:
                tensor.zero_()
        return result

    with ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "CUDAGraph", RecordedGraph),
            (torch.cuda, "graph", _graph),
            (torch_utils, "weak_ref_tensor", lambda tensor: tensor),
            (breakable_cudagraph, "weak_ref_tensor", lambda tensor: tensor),
            (CpuPlatform, "check_and_update_config", staticmethod(keep_pieces)),
            (CpuPlatform, "support_static_graph_mode", classmethod(lambda platform: True)),
            (CpuPlatform, "get_static_graph_wrapper_cls", classmethod(_wrapper)),
            (CudaGraphManager, "run_pw_graph", run_pieces),
        ):
            stack.enter_context(patch.object(owner, name, value, create=True))
        stack.enter_context(patch.dict(os.environ, {BREAKABLE: "0" if is_compiled else "1"}))
        yield


def _wrapper(platform: Any) -> str:
    return "vllm.compilation.cuda_graph.CUDAGraphWrapper"
