"""Hook: check a request's own options before it is admitted.

``SamplingParams.extra_args`` is a free dictionary: nobody but a logits processor (which costs
every sampling step) is asked whether a plugin's key is valid, so a bad value would surface in
the engine, where it harms other requests.
"""

import functools
from collections.abc import Callable
from typing import Any

from vllm.v1.engine.input_processor import InputProcessor

from vllm_spindle_patches.guard import is_applied, mark_applied, require_parameters

_callbacks: list[Callable[[Any, Any, Any, bool], None]] = []


def apply(callback: Callable[[Any, Any, Any, bool], None]) -> None:
    """Call ``callback(vllm_config, prompt, params, resumable)`` first in ``process_inputs``.

    A ``VLLMValidationError`` that it raises becomes HTTP 400 for that request alone.
    """
    if callback not in _callbacks:
        _callbacks.append(callback)
    stock = require_parameters(InputProcessor, "process_inputs", "prompt", "params", "resumable")
    if is_applied(stock):
        return

    @functools.wraps(stock)
    def process_inputs(
        self: InputProcessor, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        for each in _callbacks:
            each(self.vllm_config, prompt, params, kwargs.get("resumable", False))
        return stock(self, request_id, prompt, params, *args, **kwargs)

    InputProcessor.process_inputs = mark_applied(process_inputs)  # type: ignore[method-assign]
