"""From vLLM's own configuration to ours: the switch, what rides with the model, a request's ratio.

A multimodal processor sees a ``ModelConfig`` and no ``additional_config``. So the checked options
travel as an attribute of the model's transformers configuration, where ``--hf-overrides`` puts
its values too; vLLM carries that to every process.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.exceptions import VLLMValidationError

from vllm_covipal.config import KEEP_RATIO_KEY, CovipalConfig, load_config, parse_keep_ratio
from vllm_covipal.engine.request_fields import keep_ratio_of

SECTION = "covipal"
ATTRIBUTE = "covipal"
TEMPLATE_KEY = "covipal_chat_template"
"""Among a prompt's processor arguments: what it was rendered with, a ``ChatTemplate``."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template that the server or the engine's user chose in place of the model's own.

    Of a class of its own, because no request may bring one under that key: rendering it is vLLM's
    to allow (``--trust-request-chat-template``), and has been done when this is made.
    """

    text: str


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for, and what follows from it."""

    config: CovipalConfig
    identity: str
    """Of the selector: two that may choose differently differ in it."""
    max_text_tokens: int
    """That the selector reads: the user's word, or the pruning module's."""


def asked_for(vllm_config: VllmConfig) -> CovipalConfig | None:
    """The configuration under ``additional_config["covipal"]``; None if there is none.

    Raises:
        ValueError: if it is not valid.
    """
    additional = vllm_config.additional_config
    section = additional.get(SECTION) if isinstance(additional, dict) else None
    return None if section is None else load_config(section)


def attach(model_config: ModelConfig, options: Options) -> None:
    """Let the options travel with the model's configuration."""
    value = {
        "config": options.config.model_dump(mode="json"),
        "identity": options.identity,
        "max_text_tokens": options.max_text_tokens,
    }
    model_config.hf_config.update({ATTRIBUTE: value})


def attached(model_config: ModelConfig) -> Options | None:
    """The options that ``attach`` put there; None where covipal is off."""
    value = getattr(model_config.hf_config, ATTRIBUTE, None)
    if value is None:
        return None
    config = CovipalConfig.model_validate(value["config"])
    return Options(config, value["identity"], value["max_text_tokens"])


def take_keep_ratio(
    mm_processor_kwargs: Mapping[str, object], default: float
) -> tuple[float, dict[str, object]]:
    """A request's keep ratio, and its processor arguments without it.

    Raises:
        VLLMValidationError: HTTP 400 for this request, if the ratio or a key is not valid.
    """
    rest = dict(mm_processor_kwargs)
    value = rest.pop(KEEP_RATIO_KEY, default)
    check_keys(rest)
    try:
        return parse_keep_ratio(value), rest
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter=KEEP_RATIO_KEY, value=value) from None


def check_keys(options: Mapping[str, object]) -> None:
    """Refuse a misspelt option of ours.

    Raises:
        VLLMValidationError: HTTP 400 for this request.
    """
    for key, value in options.items():
        if key == KEEP_RATIO_KEY or isinstance(value, ChatTemplate):
            continue
        if key.startswith(SECTION) or _resembles(key):
            raise VLLMValidationError(
                f"unknown option {key!r}; did you mean {KEEP_RATIO_KEY!r}?", parameter=key
            )


def _resembles(key: str) -> bool:
    return bool(difflib.get_close_matches(key, [KEEP_RATIO_KEY], n=1, cutoff=0.85))


def processor_kwargs(vllm_xargs: Mapping[str, object]) -> dict[str, object]:
    """Our options among a request's ``vllm_xargs``, for the processor, which checks them."""
    return {key: value for key, value in vllm_xargs.items() if key.startswith(SECTION)}


def template_kwargs(chat_template: str) -> dict[str, object]:
    """For the processor of a prompt that was rendered with it."""
    return {TEMPLATE_KEY: ChatTemplate(chat_template)}


def take_template(
    mm_processor_kwargs: Mapping[str, object],
) -> tuple[str | None, dict[str, object]]:
    """What ``template_kwargs`` put there, None for the model's own, and the arguments without."""
    rest = dict(mm_processor_kwargs)
    template = rest.pop(TEMPLATE_KEY, None)
    return (template.text if isinstance(template, ChatTemplate) else None), rest


def check_request(vllm_config: VllmConfig, prompt: Any, params: Any, resumable: bool) -> None:
    """Refuse a ratio that this server cannot serve, before the request is admitted.

    A chat's ratio was checked by the processor, which stamps the prompt with what it used. This
    sees requests that never reached it, and those whose parameters came after it (offline).

    Raises:
        VLLMValidationError: HTTP 400 for this request.
    """
    extra_args = getattr(params, "extra_args", None) or {}
    check_keys(extra_args)
    keep_ratio, _ = take_keep_ratio(processor_kwargs(extra_args), 1.0)
    _refuse_if_off(vllm_config, keep_ratio)
    if KEEP_RATIO_KEY not in extra_args or not _has_items(prompt):
        return
    used = prompt.get(KEEP_RATIO_KEY)
    if used is None:  # rendered by another server, or by an earlier request
        used = keep_ratio_of(prompt.get("mm_kwargs") or {})
    if used is not None and keep_ratio != used:
        raise VLLMValidationError(
            f"{KEEP_RATIO_KEY}={keep_ratio} comes too late: this prompt's images and videos were "
            f"processed at {used}; offline, give it with the prompt, as "
            f"mm_processor_kwargs={{{KEEP_RATIO_KEY!r}: {keep_ratio}}}",
            parameter=KEEP_RATIO_KEY,
            value=keep_ratio,
        )


def check_arguments(vllm_config: VllmConfig, arguments: Mapping[str, object]) -> None:
    """The same for a request's processor arguments: a stock processor would ignore the ratio.

    Raises:
        VLLMValidationError: HTTP 400 for this request.
    """
    _refuse_if_off(vllm_config, take_keep_ratio(arguments, 1.0)[0])


def _refuse_if_off(vllm_config: VllmConfig, keep_ratio: float) -> None:
    if keep_ratio < 1 and attached(vllm_config.model_config) is None:
        raise VLLMValidationError(
            "this server runs without covipal, so it cannot prune one request's visual tokens; "
            "start it with --additional-config '{\"covipal\": {...}}'",
            parameter=KEEP_RATIO_KEY,
            value=keep_ratio,
        )


def _has_items(prompt: Any) -> bool:
    return isinstance(prompt, Mapping) and any((prompt.get("mm_placeholders") or {}).values())
