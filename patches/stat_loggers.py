"""Hook: a plugin's stat logger for those engines alone that the plugin is on for.

vLLM takes every class of the entry points ``vllm.stat_logger_plugins`` for a wish of the user's,
and counts statistics for it even where ``--disable-log-stats`` says not to. A plugin that is
installed and not asked for must change nothing.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM

from vllm_spindle_patches.guard import is_applied, mark_applied, require_parameters

_callbacks: list[Callable[[Any], Sequence[type]]] = []


def apply(callback: Callable[[Any], Sequence[type]]) -> None:
    """Add ``callback(vllm_config)``, classes of ``StatLoggerBase``, to an engine's own loggers."""
    if callback not in _callbacks:
        _callbacks.append(callback)
    stock = require_parameters(AsyncLLM, "__init__", "vllm_config", "stat_loggers")
    if is_applied(stock):
        return

    @functools.wraps(stock)
    def init(
        self: AsyncLLM, vllm_config: Any, *args: Any, stat_loggers: Any = None, **kwargs: Any
    ) -> None:
        ours = [factory for each in _callbacks for factory in each(vllm_config)]
        loggers = [*(stat_loggers or []), *ours] or stat_loggers
        stock(self, vllm_config, *args, stat_loggers=loggers, **kwargs)

    AsyncLLM.__init__ = mark_applied(init)  # type: ignore[method-assign]
