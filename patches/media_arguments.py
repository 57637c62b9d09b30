"""Hook: look at one request's processor arguments, whichever processor will get them.

``mm_processor_kwargs`` is handed to transformers, which ignores what it does not know. A plugin's
option among them is seen by the plugin's own processor, and where that is not at work by nobody.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from vllm.renderers.base import BaseRenderer

from vllm_spindle_patches.guard import is_applied, mark_applied, require_parameters

_callbacks: list[Callable[[Any, Mapping[str, object]], None]] = []


def apply(callback: Callable[[Any, Mapping[str, object]], None]) -> None:
    """Call ``callback(vllm_config, mm_processor_kwargs)`` before a request's media are processed.

    A ``VLLMValidationError`` that it raises becomes HTTP 400 for that request alone.
    """
    if callback not in _callbacks:
        _callbacks.append(callback)
    stock = require_parameters(BaseRenderer, "_process_multimodal", "self", "mm_processor_kwargs")
    if is_applied(stock):
        return

    @functools.wraps(stock)
    def _process_multimodal(
        self: Any,
        prompt: Any,
        mm_data: Any,
        mm_uuids: Any,
        mm_processor_kwargs: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        for each in _callbacks:
            each(self.config, mm_processor_kwargs or {})
        return stock(self, prompt, mm_data, mm_uuids, mm_processor_kwargs, *args, **kwargs)

    BaseRenderer._process_multimodal = mark_applied(_process_multimodal)  # type: ignore[method-assign]
