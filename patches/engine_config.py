"""Hook: look at the engine's configuration once, in the front process, before anything starts.

vLLM has no check that a plugin may take part in between ``EngineArgs`` and the engine, so a
plugin cannot refuse a flag at start-up, nor choose the worker and scheduler classes.
"""

import functools
from collections.abc import Callable
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from vllm_spindle_patches.guard import is_applied, mark_applied, require_parameters

_callbacks: list[Callable[[Any], None]] = []


def apply(callback: Callable[[Any], None]) -> None:
    """Call ``callback(vllm_config)`` after each ``EngineArgs.create_engine_config``."""
    if callback not in _callbacks:
        _callbacks.append(callback)
    stock = require_parameters(EngineArgs, "create_engine_config", "self")
    if is_applied(stock):
        return

    @functools.wraps(stock)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        vllm_config = stock(self, *args, **kwargs)
        for each in _callbacks:
            each(vllm_config)
        return vllm_config

    EngineArgs.create_engine_config = mark_applied(create_engine_config)  # type: ignore[method-assign]
