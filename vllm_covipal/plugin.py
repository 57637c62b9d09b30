"""The entry point of ``vllm.general_plugins``: makes covipal available, switches nothing on.

vLLM calls ``register`` in every process, perhaps twice. Our model classes are known under names of
their own; the front process gives one to the engine only if the user asks for covipal.
"""

from importlib.util import find_spec
from typing import Any


def register() -> None:
    """Make the classes known and open the front process's hook. Quiet where vLLM is missing."""
    if find_spec("vllm") is None:
        return
    from vllm_covipal.engine.registration import register_models
    from vllm_spindle_patches import engine_config

    register_models()
    engine_config.apply(_on_engine_config)


def _on_engine_config(vllm_config: Any) -> None:
    from vllm_covipal.engine.options import (
        check_arguments,
        check_request,
        processor_kwargs,
        template_kwargs,
    )
    from vllm_covipal.engine.startup import prepare
    from vllm_spindle_patches import (
        chat_params,
        media_arguments,
        plugin_stats,
        request_admission,
        stat_loggers,
    )

    request_admission.apply(check_request)
    media_arguments.apply(check_arguments)
    if prepare(vllm_config):
        from vllm_covipal.engine.metrics import stat_logger_classes

        chat_params.apply(processor_kwargs, template_kwargs)
        plugin_stats.apply()
        stat_loggers.apply(stat_logger_classes)
