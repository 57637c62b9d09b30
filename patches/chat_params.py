"""Hook: a plugin's option of one request reaches the multimodal processor.

``vllm_xargs`` carries plugins' options over HTTP, but the processor, which runs before admission,
is shown ``mm_processor_kwargs`` only; and that field is closed unless the server trusts its
clients with every argument of the image processor. So the option is put into the chat's
parameters, and the renderer, which takes the media options from there, takes the processor's too.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.renderers.base import BaseRenderer

from vllm_spindle_patches.guard import is_applied, mark_applied, require_parameters

_callbacks: list[Callable[[dict[str, Any]], dict[str, Any]]] = []


def apply(callback: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Add ``callback(vllm_xargs)`` to the processor arguments of each chat or response request."""
    if callback not in _callbacks:
        _callbacks.append(callback)
    for request_class in (ChatCompletionRequest, ResponsesRequest):
        stock = require_parameters(request_class, "build_chat_params", "self")
        if not is_applied(stock):
            request_class.build_chat_params = mark_applied(_adding(stock))  # type: ignore[method-assign]
    stock = require_parameters(
        BaseRenderer, "render_chat_async", "conversations", "chat_params", "prompt_extras"
    )
    if not is_applied(stock):
        BaseRenderer.render_chat_async = mark_applied(_handing_on(stock))  # type: ignore[method-assign]


def _handing_on(stock: Any) -> Any:
    @functools.wraps(stock)
    async def render_chat_async(
        self: Any,
        conversations: Any,
        chat_params: Any,
        *args: Any,
        prompt_extras: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if chat_params.mm_processor_kwargs:  # the request's own are among them
            own = {"mm_processor_kwargs": chat_params.mm_processor_kwargs}
            prompt_extras = {**(prompt_extras or {}), **own}
        return await stock(
            self, conversations, chat_params, *args, prompt_extras=prompt_extras, **kwargs
        )

    return render_chat_async


def _adding(stock: Any) -> Any:
    @functools.wraps(stock)
    def build_chat_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = stock(self, *args, **kwargs)
        added: dict[str, Any] = {}
        for each in _callbacks:
            added |= each(self.vllm_xargs or {})
        if not added:
            return params
        return replace(params, mm_processor_kwargs={**(params.mm_processor_kwargs or {}), **added})

    return build_chat_params
