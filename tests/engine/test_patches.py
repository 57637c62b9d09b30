"""Each patch is guarded: a vLLM that it does not fit is refused by name, twice is once."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine


def _nothing(*args: Any) -> None:
    """A callback that does nothing."""


def _cases() -> dict[str, tuple[Any, str, Callable[[], None]]]:
    """Per patch: the object it changes or checks, the name on it, and how to apply it."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.model_executor.layers.attention import attention
    from vllm.renderers.base import BaseRenderer
    from vllm.triton_utils import dispatcher
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_spindle_patches import (
        attention_layer,
        beam_search,
        chat_params,
        encoder_reset,
        engine_config,
        kernel_overrides,
        media_arguments,
        request_admission,
        scheduler_overrides,
        stat_loggers,
    )

    def layer() -> None:
        attention_layer.apply(lambda layer, config, stock: stock, lambda stock: stock)

    def chats() -> None:
        chat_params.apply(_nothing, _nothing)  # type: ignore[arg-type]

    overrides = {
        f"{owner.__name__}.{name}": (owner, name, scheduler_overrides.check)
        for owner, name, _ in scheduler_overrides.NEEDED
    }
    return {
        **overrides,
        "engine_config": (
            EngineArgs,
            "create_engine_config",
            lambda: engine_config.apply(_nothing),
        ),
        "request_admission": (
            InputProcessor,
            "process_inputs",
            lambda: request_admission.apply(_nothing),
        ),
        "beam_search": (
            beam_search.BeamSearchOnlineMixin,
            "beam_search",
            lambda: beam_search.apply(_nothing),
        ),
        "beam_search_offline": (
            beam_search.BeamSearchOfflineMixin,
            "beam_search",
            lambda: beam_search.apply(_nothing),
        ),
        "media_arguments": (
            BaseRenderer,
            "_process_multimodal",
            lambda: media_arguments.apply(_nothing),
        ),
        "chat_requests": (ChatCompletionRequest, "build_chat_params", chats),
        "response_requests": (ResponsesRequest, "build_chat_params", chats),
        "chats": (BaseRenderer, "render_chat", chats),
        "chats_async": (BaseRenderer, "render_chat_async", chats),
        "stat_loggers": (AsyncLLM, "__init__", lambda: stat_loggers.apply(_nothing)),
        "encoder_reset": (
            GPUModelRunner,
            "reset_encoder_cache",
            lambda: encoder_reset.apply(_nothing),
        ),
        "kernel_overrides": (dispatcher, "_rebind_kernels", kernel_overrides.apply),
        "attention_spec": (attention.Attention, "get_kv_cache_spec", layer),
        "attention_backend": (attention, "get_attn_backend", layer),
    }


CASES = [
    "engine_config",
    "request_admission",
    "beam_search",
    "beam_search_offline",
    "media_arguments",
    "chat_requests",
    "response_requests",
    "chats",
    "chats_async",
    "encoder_reset",
    "stat_loggers",
    "kernel_overrides",
    "attention_spec",
    "attention_backend",
]
# What would be silent: an override that vLLM no longer calls.
OVERRIDES = [
    "Scheduler._get_local_prefix_cache_hit",
    "Scheduler._reserve_prefill_lookahead",
    "Scheduler._preempt_request",
    "Scheduler._free_blocks",
    "FullAttentionManager.cache_blocks",
    "FullAttentionManager.remove_skipped_blocks",
]


WITH_CALLBACKS = (
    "beam_search",
    "chat_params",
    "encoder_reset",
    "engine_config",
    "media_arguments",
    "request_admission",
    "stat_loggers",
)


@pytest.fixture(autouse=True)
def _restore() -> Any:
    """vLLM and the patches' callbacks as they were."""
    stock = {(owner, name): getattr(owner, name) for owner, name, _ in _cases().values()}
    modules = [import_module(f"vllm_spindle_patches.{name}") for name in WITH_CALLBACKS]
    callbacks = [(m, list(m._callbacks)) for m in modules]
    yield
    for (owner, name), value in stock.items():
        setattr(owner, name, value)
    for module, before in callbacks:
        module._callbacks[:] = before


# Of ``__init__`` every class has one.
@pytest.mark.parametrize("case", [c for c in CASES + OVERRIDES if c != "stat_loggers"])
def test_a_missing_symbol_is_named(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PatchMismatchError says which name this vLLM does not have."""
    from vllm_spindle_patches.guard import PatchMismatchError

    owner, name, apply = _cases()[case]
    for each in getattr(owner, "__mro__", [owner]):  # A base may declare it too.
        if name in vars(each):
            monkeypatch.delattr(each, name)
    with pytest.raises(PatchMismatchError, match=rf"no .*\.{name} "):
        apply()


@pytest.mark.parametrize(
    ("case", "parameter"),
    [
        ("request_admission", "resumable"),
        ("media_arguments", "mm_processor_kwargs"),
        ("chats", "chat_params"),
        ("chats_async", "prompt_extras"),
        ("stat_loggers", "stat_loggers"),
        ("kernel_overrides", "overrides"),
        ("attention_spec", "vllm_config"),
        ("attention_backend", "head_size"),
        ("Scheduler._get_local_prefix_cache_hit", "request"),
        ("Scheduler._reserve_prefill_lookahead", "num_new_tokens"),
        ("FullAttentionManager.cache_blocks", "num_tokens"),
        ("FullAttentionManager.remove_skipped_blocks", "num_prompt_tokens"),
    ],
)
def test_a_missing_parameter_is_named(
    case: str, parameter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PatchMismatchError says which parameter is gone, and of what."""
    from vllm_spindle_patches.guard import PatchMismatchError

    owner, name, apply = _cases()[case]
    monkeypatch.setattr(owner, name, lambda self: None)
    with pytest.raises(PatchMismatchError, match=rf"\.{name} takes no parameter .*{parameter}"):
        apply()
    assert getattr(owner, name).__name__ == "<lambda>", "a refused patch must leave no wrapper"


@pytest.mark.parametrize("case", CASES)
def test_applied_twice_is_one_wrapper(case: str) -> None:
    """The second call wraps nothing again: one step leads from the wrapper to vLLM's own."""
    from vllm_spindle_patches.guard import is_applied

    owner, name, apply = _cases()[case]
    apply()
    apply()
    wrapper = getattr(owner, name)
    assert is_applied(wrapper)
    assert wrapper.__name__ == name
    assert not is_applied(wrapper.__wrapped__)


def test_every_override_is_checked_where_the_engine_core_starts() -> None:
    """Whatever our scheduler and block manager take the place of is on the list."""
    found = in_child(overridden)
    assert found["unchecked"] == []
    assert found["num_overridden"] >= 10
    assert "_get_local_prefix_cache_hit" in found["refused"]


def overridden() -> dict[str, Any]:
    """Names that we override and no guard knows; what starting says once one is renamed."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    from vllm_spindle.engine.manager import SpindleManager
    from vllm_spindle.engine.scheduler import SpindleSchedulerMixin
    from vllm_spindle_patches.guard import PatchMismatchError
    from vllm_spindle_patches.scheduler_overrides import NEEDED

    ours = {
        (stock, name)
        for mine, stock in (
            (SpindleSchedulerMixin, Scheduler),
            (SpindleManager, FullAttentionManager),
        )
        for name, method in vars(mine).items()
        if callable(method) and not name.startswith("__") and hasattr(stock, name)
    }
    checked = {(owner, name) for owner, name, _ in NEEDED}
    unchecked = [f"{owner.__name__}.{name}" for owner, name in ours - checked]
    Scheduler._get_prefix_cache_hit = Scheduler._get_local_prefix_cache_hit
    del Scheduler._get_local_prefix_cache_hit
    refused = ""
    try:
        import vllm_spindle.processes.scheduler  # noqa: F401
    except PatchMismatchError as error:
        refused = str(error)
    return {"unchecked": unchecked, "num_overridden": len(ours), "refused": refused}


def test_statistics_travel_as_vllm_decodes_them() -> None:
    """The added field is on both classes once, and survives the engine's own serialiser."""
    import dataclasses

    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    from vllm_spindle_patches import plugin_stats

    plugin_stats.apply()
    plugin_stats.apply()
    for owner in (ModelRunnerOutput, SchedulerStats):
        assert [f.name for f in dataclasses.fields(owner)].count("plugin_stats") == 1
        assert owner.plugin_stats is None
    stats = SchedulerStats()
    stats.plugin_stats = {"spindle": {"seconds": 0.5, "held_blocks": [1, 2]}}
    decoded = MsgpackDecoder(SchedulerStats).decode(MsgpackEncoder().encode(stats))
    assert decoded.plugin_stats == stats.plugin_stats


def test_a_closed_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should vLLM make a statistics class slotted, the field cannot be added, and we say so."""
    import dataclasses

    from vllm_spindle_patches import plugin_stats
    from vllm_spindle_patches.guard import PatchMismatchError

    @dataclasses.dataclass(slots=True)
    class SchedulerStats:
        step: int = 0

    monkeypatch.setattr(plugin_stats, "SchedulerStats", SchedulerStats)
    with pytest.raises(PatchMismatchError, match="SchedulerStats is no open dataclass"):
        plugin_stats.apply()
