"""Hook: ask before a beam search.

vLLM makes one of many requests, a new prompt and one token each, in the front process. None of them
says that it belongs to a beam search, nor carries the options that came with it.
"""

import functools
from collections.abc import Callable
from typing import Any

from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin

from vllm_spindle_patches.guard import is_applied, mark_applied, require_parameters

ENGINE_OF: tuple[tuple[Any, str], ...] = (
    (BeamSearchOnlineMixin, "engine_client"),
    (BeamSearchOfflineMixin, "llm_engine"),
)
"""Owner, and where it has its engine."""

_callbacks: list[Callable[[Any], None]] = []


def apply(callback: Callable[[Any], None]) -> None:
    """Call ``callback(vllm_config)`` first in ``beam_search``, over HTTP and offline.

    A ``VLLMValidationError`` that it raises becomes HTTP 400 for that request alone.
    """
    if callback not in _callbacks:
        _callbacks.append(callback)
    for owner, engine in ENGINE_OF:
        stock = require_parameters(owner, "beam_search", "self", "params")
        if not is_applied(stock):
            owner.beam_search = mark_applied(_asking(stock, engine))


def _asking(stock: Any, engine: str) -> Any:
    # No coroutine, even where the stock method is an asynchronous generator: the error comes at
    # once, before an answer has begun.
    @functools.wraps(stock)
    def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        for each in _callbacks:
            each(getattr(self, engine).vllm_config)
        return stock(self, *args, **kwargs)

    return beam_search
