"""The entry point of ``vllm.general_plugins``: makes spindle available, switches nothing on.

vLLM calls ``register`` in every process, perhaps twice. In the front process it fills two hooks:
one that reads ``--additional-config`` when the engine is configured, one that checks a request's
own options. The other processes open theirs when vLLM starts our classes there, which it does
only if spindle was switched on (``vllm_spindle.processes``).
"""

from importlib.util import find_spec
from typing import Any


def register() -> None:
    """Open the front process's hooks. Returns quietly where vLLM is missing."""
    if find_spec("vllm") is None:
        return
    from vllm_spindle_patches import engine_config

    engine_config.apply(_on_engine_config)


def _on_engine_config(vllm_config: Any) -> None:
    from vllm_spindle.engine.options import check_beam_search, check_request
    from vllm_spindle.engine.startup import prepare
    from vllm_spindle_patches import beam_search, plugin_stats, request_admission, stat_loggers

    request_admission.apply(check_request)
    if prepare(vllm_config):
        from vllm_spindle.engine.metrics import stat_logger_classes

        plugin_stats.apply()
        stat_loggers.apply(stat_logger_classes)
        beam_search.apply(check_beam_search)
