"""Hook: a plugin's option of one request, and its chat template, reach the multimodal processor.

``vllm_xargs`` carries plugins' options over HTTP, but the processor, which runs before admission,
is shown ``mm_processor_kwargs`` only; and that field is closed unless the server trusts its
clients with every argument of the image processor. So the option is put into the chat's
parameters, and the renderer, which takes the media options from there, takes the processor's too.

A template that is not the model's own (``--chat-template``, a request's, ``LLM.chat``'s) is known
to the renderer alone, which hands on what it made of it: tokens.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.renderers.base import BaseRenderer

from vllm_spindle_patches.guard import is_applied, mark_applied, require_parameters

OfXargs = Callable[[dict[str, Any]], dict[str, Any]]
OfTemplate = Callable[[str], dict[str, Any]]

_callbacks: list[tuple[OfXargs, OfTemplate]] = []


def apply(of_xargs: OfXargs, of_template: OfTemplate) -> None:
    """Add both to the processor arguments of each chat or response request.

    Args:
        of_xargs: called with the request's ``vllm_xargs``.
        of_template: called with the chat template, if it is not the model's own.
    """
    if (of_xargs, of_template) not in _callbacks:
        _callbacks.append((of_xargs, of_template))
    for request_class in (ChatCompletionRequest, ResponsesRequest):
        stock = require_parameters(request_class, "build_chat_params", "self")
        if not is_applied(stock):
            request_class.build_chat_params = mark_applied(_adding(stock))  # type: ignore[method-assign]
    for name in ("render_chat", "render_chat_async"):
        stock = require_parameters(
            BaseRenderer, name, "conversations", "chat_params", "prompt_extras"
        )
        if not is_applied(stock):
            setattr(BaseRenderer, name, mark_applied(_handing_on(stock)))


def _handing_on(stock: Any) -> Any:
    @functools.wraps(stock)
    def render_chat(  # of the asynchronous one, too: what it returns is awaited by its caller
        self: Any,
        conversations: Any,
        chat_params: Any,
        *args: Any,
        prompt_extras: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        own = dict(chat_params.mm_processor_kwargs or {})  # the request's are among them
        if chat_params.chat_template is not None:
            for _, of_template in _callbacks:
                own |= of_template(chat_params.chat_template)
        if own:
            given = prompt_extras or {}
            kwargs_of_prompt = {**(given.get("mm_processor_kwargs") or {}), **own}
            prompt_extras = {**given, "mm_processor_kwargs": kwargs_of_prompt}
        return stock(self, conversations, chat_params, *args, prompt_extras=prompt_extras, **kwargs)

    return render_chat


def _adding(stock: Any) -> Any:
    @functools.wraps(stock)
    def build_chat_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = stock(self, *args, **kwargs)
        added: dict[str, Any] = {}
        for of_xargs, _ in _callbacks:
            added |= of_xargs(self.vllm_xargs or {})
        if not added:
            return params
        return replace(params, mm_processor_kwargs={**(params.mm_processor_kwargs or {}), **added})

    return build_chat_params
