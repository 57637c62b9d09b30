"""FULL CUDA graphs on a CPU, emulated: model runner V2's own dispatch, padding and capture.

A capture keeps the forward as Python, with the metadata of its capture; a replay runs it again.
So whatever a builder hands out that is not in a persistent buffer is stale in a replay, as it
would be in a graph, and shows up as wrong tokens. A replayed forward cannot ask about the step
either, as a graph does not. Not emulated: other Python that a graph freezes, what may not be
captured, streams, torch.compile.

vLLM's CPU attention plans its work on the host while metadata is built; GPU kernels do that on the
device from lengths and query starts. In a replay it plans anew, from the captured buffers.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from engine_probe.recorded import pieces, recording

CAPTURE_SIZES = [1, 2, 4, 8]


@contextmanager
def full_graphs(
    mode: str = "FULL_DECODE_ONLY", sizes: list[int] | None = None, *, is_compiled: bool = False
) -> Iterator[Counter]:
    """Engines made inside capture their forwards; yields how often each kind of them ran.

    Keys: tokens of each replayed graph. PIECEWISE modes need what ``recorded.BREAKABLE`` says.
    """
    from vllm.config.compilation import CUDAGraphMode
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
    from vllm.v1.worker.workspace import (
        init_workspace_manager,
        is_workspace_manager_initialized,
        unlock_workspace,
    )

    runs: Counter = Counter()
    init_device, warm_up = CPUWorker.init_device, CPUWorker.compile_or_warm_up_model
    available = CPUWorker.determine_available_memory

    def ask_for_graphs(worker: Any) -> None:
        config = worker.vllm_config.compilation_config
        config.cudagraph_mode = CUDAGraphMode[mode]
        config.cudagraph_capture_sizes = sizes or CAPTURE_SIZES
        config.max_cudagraph_capture_size = max(config.cudagraph_capture_sizes)
        init_device(worker)

    def profile_too(worker: Any) -> int:
        """As on a GPU: what graphs will take, by captures over a cache that is thrown away."""
        worker.model_runner.profile_cudagraph_memory()
        return available(worker)

    def capture_too(worker: Any) -> Any:
        times = warm_up(worker)
        if mode == "NONE":
            return times
        # As on a GPU, whose warm-up executes steps before it captures.
        worker.execute_model(SchedulerOutput.make_empty())
        assert worker.model_runner.needs_cudagraph_capture()
        if not is_workspace_manager_initialized():  # not by the CPU's worker
            init_workspace_manager(worker.device)
        worker.model_runner.capture_model()
        unlock_workspace()
        runs.clear()
        return times

    def capture(manager: Any, create_forward_fn: Any, progress_bar_desc: str = "") -> None:
        for desc in manager._capture_descs.get(CUDAGraphMode.PIECEWISE, ()):
            forward = create_forward_fn(desc, warmup=True)
            forward(CUDAGraphMode.NONE)
            if manager.use_breakable_cg:
                forward = create_forward_fn(desc, warmup=False)
            with recording():
                forward(CUDAGraphMode.PIECEWISE)
        for desc in manager._capture_descs.get(CUDAGraphMode.FULL, ()):
            create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)
            forward = create_forward_fn(desc, warmup=False)
            forward(CUDAGraphMode.NONE)
            manager.graphs[desc] = SimpleNamespace(replay=_replay(forward, desc, runs))
        manager._graphs_captured = True

    with ExitStack() as stack:
        if is_compiled or CUDAGraphMode[mode].has_piecewise_cudagraphs():
            stack.enter_context(pieces(runs, is_compiled=is_compiled))
        for owner, name, value in (
            (CPUWorker, "init_device", ask_for_graphs),
            (CPUWorker, "determine_available_memory", profile_too),
            (CPUWorker, "compile_or_warm_up_model", capture_too),
            (CudaGraphManager, "capture", capture),
            (CpuPlatform, "get_global_graph_pool", lambda platform: None),
            (CpuPlatform, "graph_pool_handle", lambda platform: None),
            (CPUAttentionMetadataBuilder, "_cudagraph_support", AttentionCGSupport.ALWAYS),
        ):
            stack.enter_context(patch.object(owner, name, value, create=True))
        stack.enter_context(_planning_anew())
        yield runs


def _replay(forward: Any, desc: Any, runs: Counter) -> Any:
    from vllm.config.compilation import CUDAGraphMode

    from vllm_spindle.engine.active import activate, active_reduction

    captured = active_reduction()

    def replay() -> None:
        runs[desc.num_tokens] += 1
        with _blindfolded(), activate(captured):
            forward(CUDAGraphMode.NONE)

    return replay


@contextmanager
def _blindfolded() -> Iterator[None]:
    """Nothing in the block sees more of the step than a capture did."""
    from vllm_spindle.engine.active import active_reduction
    from vllm_spindle.engine.step import Step

    reduction = active_reduction()
    if reduction is None:  # stock
        yield
        return
    step, rows = reduction._step, reduction.stash._rows
    reduction._step = Step.idle(len(step.bands))
    reduction.stash._rows = None
    try:
        yield
    finally:
        reduction._step, reduction.stash._rows = step, rows


@contextmanager
def _planning_anew() -> Iterator[None]:
    """CPU attention plans in every forward, from the lengths that its metadata holds by then."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import (
        CPUAttentionBackendImpl,
        CPUAttentionMetadataBuilder,
    )

    build, forward = CPUAttentionMetadataBuilder.build, CPUAttentionBackendImpl.forward

    def building(builder: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = build(builder, *args, **kwargs)
        metadata.plan = lambda: ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(metadata.seq_lens),
            num_heads=builder.num_heads,
            num_kv_heads=builder.num_kv_heads,
            head_dim=builder.head_dim,
            seq_lens=metadata.seq_lens,
            dtype=builder.dtype,
            query_start_loc=metadata.query_start_loc,
            causal=metadata.causal,
            sliding_window_size=builder.window_size,
            isa=builder.isa,
            enable_kv_split=False,
            dynamic_causal=None,
            kv_cache_dtype=builder.kv_cache_dtype,
        )
        return metadata

    def forwarding(impl: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = args[5] if len(args) > 5 else kwargs.get("attn_metadata")
        if metadata is not None:
            metadata.scheduler_metadata = metadata.plan()
        return forward(impl, *args, **kwargs)

    with (
        patch.object(CPUAttentionMetadataBuilder, "build", building),
        patch.object(CPUAttentionBackendImpl, "forward", forwarding),
    ):
        yield
