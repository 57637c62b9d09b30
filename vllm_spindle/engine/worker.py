"""The worker's adapter: a step's reduction before, during and after vLLM's forward.

What differs between model runners V1 and V2 is in ``runners.py``.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils import length_from_prompt_token_ids_or_embeds

from vllm_spindle.engine.active import activate
from vllm_spindle.engine.decoders import CPU_BACKEND, Decoder, make_decoder, warm_up
from vllm_spindle.engine.graphs import most_captured_tokens
from vllm_spindle.engine.known_answer import check_heads
from vllm_spindle.engine.options import first_kv_head, request_options
from vllm_spindle.engine.prompt_tokens import ReducedLayer
from vllm_spindle.engine.reduction import Reducer
from vllm_spindle.engine.refusals import group_refusals, raise_if_any
from vllm_spindle.engine.rotary_table import rotary_table
from vllm_spindle.engine.runners import RunnerView, view_of
from vllm_spindle.engine.spec import SpindleSpec
from vllm_spindle.engine.step import HeadRows, PromptEnd, Step
from vllm_spindle.engine.window import WindowStash


class SpindleWorkerMixin:
    """Reduces prompts after the step that ends them. Mixed into vLLM's worker class."""

    _reduction: "RunnerReduction | None" = None

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's KV cache, then ours on top: what cannot be reduced stops start-up here."""
        result = super().initialize_from_config(*args, **kwargs)
        self._reduction = RunnerReduction(self.model_runner)
        return result

    def compile_or_warm_up_model(self) -> Any:
        """vLLM's warm-up and capture, as in a step in which nothing is reduced.

        So that what is captured reads our buffers, and lays the queries aside.
        """
        with self._idle():
            return super().compile_or_warm_up_model()

    def execute_dummy_batch(self, *args: Any, **kwargs: Any) -> Any:
        """The same: a replayed graph must not find the rows of the last step."""
        with self._idle():
            return super().execute_dummy_batch(*args, **kwargs)

    def _idle(self) -> AbstractContextManager[None]:
        reduction = self._reduction
        if reduction is None:
            return nullcontext()
        reduction.rest()
        return activate(reduction)

    def execute_model(self, scheduler_output: Any) -> Any:
        """vLLM's step, then the reduction of every prompt that ended in it."""
        reduction = self._reduction
        assert reduction is not None
        reduction.begin(scheduler_output)
        with activate(reduction):
            output = super().execute_model(scheduler_output)
            reduction.finish()
        reduction.rest()
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        """vLLM's sampling; the step's reduction numbers ride on its output."""
        output = super().sample_tokens(grammar_output)
        stats = self._reduction.reducer.take_stats() if self._reduction is not None else None
        if stats is not None:
            # Model runner V2 wraps what is still on its way from the device.
            carrier = getattr(output, "model_runner_output", output)
            carrier.plugin_stats = {**(carrier.plugin_stats or {}), "spindle": stats}
        return output


class RunnerReduction:
    """One runner's reduction, step by step."""

    def __init__(self, runner: Any) -> None:
        self._view = view_of(runner)
        self.reducer = _make_reducer(runner, self._view)
        config = runner.vllm_config.scheduler_config
        self._queue = self.reducer.policy.reduction_queue(config.max_num_batched_tokens)
        self._ends: dict[str, PromptEnd] = {}
        self._group_of_band = _groups(runner)
        self.reducer.warm_up()
        self._scheduler_output: Any = None
        self._step: Step | None = None
        attention = _first_layer(runner, self._group_of_band[0])
        self._backend = attention.attn_backend.get_name()
        self._decoders = {
            layer.layer_idx: make_decoder(layer, self._backend, self.reducer.layout)
            for band in self.reducer.bands
            for layer in band
            if layer.cos_sin is not None
        }
        for layer in [layer for band in self.reducer.bands for layer in band]:
            if layer.cos_sin is not None:
                warm_up(self._decoders[layer.layer_idx], layer, attention.num_heads, self._backend)
                break
        # The CPU's kernels read pages in every test.
        if self.reducer.policy.profile is not None and self._backend != CPU_BACKEND:
            self._check_heads(runner, attention)

    @property
    def step(self) -> Step:
        """The current step, planned when first asked for: once the batch is up to date."""
        if self._step is None:
            self._step = self.reducer.plan_step(self._view.batch(self._scheduler_output))
            self.stash.expect(self._step.window)
        return self._step

    @property
    def stash(self) -> WindowStash:
        """The window's queries."""
        return self.reducer.stash

    def decoder(self, layer_idx: int) -> Decoder:
        """The compiled kernel that reads a layer's codebooks."""
        return self._decoders[layer_idx]

    def _check_heads(self, runner: Any, attention: Any) -> None:
        group = self._group_of_band[0]
        check_heads(
            runner.attn_groups[group][0].get_metadata_builder(0),
            attention,
            self._pretend,
            num_layers=len(self.reducer.bands[0]),
            max_rows=runner.vllm_config.scheduler_config.max_num_seqs,
            num_columns=runner.block_tables.input_block_tables[group].shape[1],
        )

    @contextmanager
    def _pretend(self, rows: HeadRows) -> Iterator[None]:
        """For the time of the block the step has these rows in the first band."""
        num_bands = len(self.reducer.bands)
        self._step = replace(Step.idle(num_bands), heads=(rows, *(None,) * (num_bands - 1)))
        try:
            with activate(self):
                yield
        finally:
            self.rest()

    def rest(self) -> None:
        """Between steps: captures and dummy batches, of no request, may come."""
        self._step = Step.idle(len(self.reducer.bands))
        self.stash.expect(None)

    def begin(self, scheduler_output: Any) -> None:
        """A new step: learn new requests, forget the ended ones."""
        self._scheduler_output = scheduler_output
        self._step = None
        preempted = scheduler_output.preempted_req_ids or ()
        for request_id in (*scheduler_output.finished_req_ids, *preempted):
            # A preempted request computes its whole prompt again, window included.
            self.stash.release(request_id)
            self._queue.drop(request_id)
            self._ends.pop(request_id, None)
        for request_id in scheduler_output.finished_req_ids:
            self.reducer.forget(request_id)
        for request in scheduler_output.scheduled_new_reqs:
            prompt_len = length_from_prompt_token_ids_or_embeds(
                request.prompt_token_ids, request.prompt_embeds
            )
            self.reducer.admit(
                request.req_id,
                prompt_len,
                request_options(request.sampling_params),
                _visual_mask(request.mm_features, prompt_len),
            )

    @torch.inference_mode()
    def finish(self) -> None:
        """Reduce prompts that ended, as much as a step may; the scheduler holds back the rest."""
        self.stash.settle()
        ends = self._step.prompt_ends if self._step is not None else ()
        for end in sorted(ends, key=lambda end: end.request_id):
            self._queue.push(end.request_id, end.prompt_len)
            self._ends[end.request_id] = end
        for work in self._queue.advance():
            end = self._ends[work.request_id]
            self.reducer.reduce(end, work.first_layer, work.stop_layer, self._block_ids)
            if work.request_id not in self._queue:
                del self._ends[work.request_id]

    def _block_ids(self, band: int, request_id: str) -> Tensor:
        block_ids = self._view.block_ids(self._group_of_band[band], request_id)
        return block_ids.to(self.reducer.bands[0][0].kv_cache.device)


def _visual_mask(mm_features: Any, prompt_len: int) -> Tensor | None:
    """Prompt tokens that stand for images or videos: after a pruner, those that it kept."""
    visual = [f for f in mm_features if f.modality in ("image", "video")]
    if not visual:
        return None
    mask = torch.zeros(prompt_len, dtype=torch.bool)
    for feature in visual:
        for start, last in feature.mm_position.extract_embeds_range():
            mask[start : last + 1] = True
    return mask


def _groups(runner: Any) -> list[int]:
    """KV-cache group of each band.

    Raises:
        ValueError: if a band is not one group, or not all of it.
    """
    groups = runner.kv_cache_config.kv_cache_groups
    order = sorted(range(len(groups)), key=lambda group: groups[group].kv_cache_spec.band)
    in_order = [groups[group] for group in order]
    raise_if_any(group_refusals(in_order, groups[0].kv_cache_spec.policy))
    return order


def _make_reducer(runner: Any, view: RunnerView) -> Reducer:
    groups = runner.kv_cache_config.kv_cache_groups
    layers = runner.compilation_config.static_forward_context
    merges = groups[0].kv_cache_spec.policy.config.merges
    bands = [
        [
            _reduced_layer(layers[name], rotary_table(runner.model, name) if merges else None)
            for name in groups[group].layer_names
        ]
        for group in _groups(runner)
    ]
    spec = groups[0].kv_cache_spec
    assert isinstance(spec, SpindleSpec)
    for group, block_size in zip(groups, view.table_block_sizes(), strict=True):
        if block_size != group.kv_cache_spec.block_size:
            raise ValueError(
                f"spindle: --block-size {group.kv_cache_spec.block_size} is split by the "
                f"attention kernel into blocks of {block_size}; pass --block-size {block_size}"
            )
    cache = bands[0][0].kv_cache
    attention = _first_layer(runner, 0)
    stash = WindowStash(
        num_layers=spec.policy.num_layers,
        num_heads=attention.num_heads,
        head_size=attention.head_size,
        dtype=cache.dtype,
        device=cache.device,
        staged_tokens=most_captured_tokens(runner.compilation_config),
    )
    first = first_kv_head(runner.vllm_config, get_tensor_model_parallel_rank())
    # The CPU's kernels pack blocks their own way, and torch is as fast there.
    in_place = attention.attn_backend.get_name() != CPU_BACKEND
    return Reducer(spec.policy, bands, stash, first, in_place=in_place)


def _first_layer(runner: Any, group: int) -> Any:
    """Of a KV-cache group: not everything that a forward looks up by name is attention."""
    name = runner.kv_cache_config.kv_cache_groups[group].layer_names[0]
    return runner.compilation_config.static_forward_context[name]


def _reduced_layer(layer: Any, cos_sin: Tensor | None) -> ReducedLayer:
    def write(keys: Tensor, values: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        layer.impl.do_kv_cache_update(layer, keys, values, kv_cache, slot_mapping)

    return ReducedLayer(
        layer_idx=extract_layer_index(layer.layer_name),
        kv_cache=layer.kv_cache,
        scale=layer.impl.scale,
        write=write,
        cos_sin=cos_sin,
    )
