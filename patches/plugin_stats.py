"""Hook: a place for a plugin's numbers on vLLM's own way from worker to ``/metrics``.

``ModelRunnerOutput`` (worker to scheduler) and ``SchedulerStats`` (engine core to API server)
are closed dataclasses: numbers of a plugin have no field to travel in. This adds one to each,
``plugin_stats: dict | None = None``, under the name that both sides of the socket decode.
"""

import dataclasses
from typing import Any

from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput

from vllm_spindle_patches.guard import PatchMismatchError

FIELD = "plugin_stats"


def apply() -> None:
    """Add the field to both classes. Must run before vLLM builds its message decoders."""
    for owner in (ModelRunnerOutput, SchedulerStats):
        if FIELD not in getattr(owner, "__dataclass_fields__", {FIELD}):
            _add_field(owner)


def _add_field(owner: type) -> None:
    """What ``dataclass`` does for ``plugin_stats: dict[str, Any] | None = None``, afterwards.

    ``__init__`` does not learn the field; it is set on the instance. msgspec decodes by
    ``__dataclass_fields__`` and the annotations, both read when a decoder is first built.
    """
    if not dataclasses.is_dataclass(owner) or "__slots__" in vars(owner):
        raise PatchMismatchError(f"{owner.__module__}.{owner.__qualname__} is no open dataclass")
    template = dataclasses.make_dataclass("_", [(FIELD, dict[str, Any] | None, None)])
    owner.__dataclass_fields__[FIELD] = dataclasses.fields(template)[0]
    owner.__annotations__[FIELD] = dict[str, Any] | None
    setattr(owner, FIELD, None)
