"""Hook: a worker's numbers, from a plugin that adds neither a worker nor a scheduler class.

``plugin_stats`` opens a field on vLLM's way from worker to ``/metrics``; this fills it after each
step and hands it on. Each rank may be asked, vLLM listens to one.
"""

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_spindle_patches import plugin_stats
from vllm_spindle_patches.guard import is_applied, mark_applied, require_parameters

Source = Callable[[Any], dict[str, float] | None]

_sources: dict[str, Source] = {}
_pending: WeakKeyDictionary[Any, dict[str, dict[str, float]]] = WeakKeyDictionary()
"""By scheduler: what workers reported since its last report."""


def apply(name: str, source: Source) -> None:
    """Report ``source(model_runner)``, counts by name, as ``plugin_stats[name]``, added up."""
    plugin_stats.apply()
    _sources[name] = source
    for owner, method, parameters, wrap in (
        (GPUModelRunner, "sample_tokens", ("grammar_output",), _reporting),
        (GPUModelRunnerV2, "sample_tokens", ("grammar_output",), _reporting),
        (Scheduler, "update_from_output", ("model_runner_output",), _adding),
        (Scheduler, "make_stats", (), _handing_on),
    ):
        stock = require_parameters(owner, method, *parameters)
        if not is_applied(stock):
            setattr(owner, method, mark_applied(functools.wraps(stock)(wrap(stock))))


def _reporting(stock: Any) -> Any:
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = stock(self, *args, **kwargs)
        # Runner V2 wraps what is still on its way from the device. V1's asynchronous output is
        # filled elsewhere; its counts wait for the next step.
        carrier = getattr(output, "model_runner_output", output)
        if isinstance(carrier, ModelRunnerOutput):
            found = {name: stats for name, of in _sources.items() if (stats := of(self))}
            if found:
                _merge(carrier, found)
        return output

    return sample_tokens


def _adding(stock: Any) -> Any:
    def update_from_output(
        self: Any, scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        reported = getattr(model_runner_output, plugin_stats.FIELD, None) or {}
        for name in _sources.keys() & reported.keys():
            total = _pending.setdefault(self, {}).setdefault(name, {})
            for key, count in reported[name].items():
                total[key] = total.get(key, 0) + count
        return stock(self, scheduler_output, model_runner_output, *args, **kwargs)

    return update_from_output


def _handing_on(stock: Any) -> Any:
    def make_stats(self: Any, *args: Any, **kwargs: Any) -> Any:
        scheduler_stats = stock(self, *args, **kwargs)
        if scheduler_stats is not None and self in _pending:
            _merge(scheduler_stats, _pending.pop(self))
        return scheduler_stats

    return make_stats


def _merge(owner: Any, stats: dict[str, Any]) -> None:
    """Add to what another plugin may have put there."""
    setattr(owner, plugin_stats.FIELD, {**(getattr(owner, plugin_stats.FIELD) or {}), **stats})
