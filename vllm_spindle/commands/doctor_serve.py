"""The doctor's checks of a model and the flags of ``vllm serve``: configured, never started."""

import contextlib
import io
import shutil
from typing import Any

from vllm_spindle.commands.doctor import Check
from vllm_spindle.config import SpindleConfig, load_config

COMPILERS = ("g++", "c++", "clang++")


def serve_checks(model: str, flags: list[str], *, default: SpindleConfig) -> list[Check]:
    """What ``vllm serve MODEL flags`` would be told at start-up.

    What only the model's own code reveals (ALiBi, soft-caps, sinks) is refused later, by the
    worker, when it builds the layers.

    Args:
        model: folder or name.
        flags: of ``vllm serve``.
        default: checked where the flags ask for no spindle.
    """
    try:
        vllm_config, asked = _configure(model, flags)
    except _FlagError as error:
        return [Check("flags", str(error), "see vllm serve --help")]
    except Exception as error:  # vLLM's own refusals, of any class
        return [Check("model and flags", _first_line(error), "mend what vLLM itself refuses")]
    try:
        config = default if asked is None else load_config(asked)
    except ValueError as error:
        return [Check("options", str(error), 'mend the value of "spindle" in --additional-config')]
    checks = _spindle_checks(vllm_config, config)
    if not vllm_config.model_config.enforce_eager and not any(map(shutil.which, COMPILERS)):
        checks.append(
            Check(
                "compiler", "no C++ compiler for torch.compile", "install g++, or --enforce-eager"
            )
        )
    return checks


def _spindle_checks(vllm_config: Any, config: SpindleConfig) -> list[Check]:
    from vllm_spindle.engine.options import fit
    from vllm_spindle.engine.refusals import config_refusals
    from vllm_spindle.engine.startup import describe

    if not config.is_on:
        return [Check("spindle", "keep_ratio is 1.0: off, the engine is stock")]
    try:
        config = fit(vllm_config, config)
    except ValueError as error:
        return [Check("options", str(error), "change the option")]
    refusals = config_refusals(vllm_config, config)
    if refusals:
        return [
            Check(str(each.option), f"{each.option}={each.value}: {each.reason}", each.way_out)
            for each in dict.fromkeys(refusals)
        ]
    try:
        return [Check("spindle", describe(vllm_config, config))]
    except ValueError as error:
        return [Check("options", str(error), "change the option")]


class _FlagError(Exception):
    """vLLM's parser did not take the flags."""


def _configure(model: str, flags: list[str]) -> tuple[Any, Any]:
    """vLLM's configuration without spindle, and what the flags asked of spindle."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = parser.parse_args([model, *flags])
    except (SystemExit, ValueError) as error:
        lines = said.getvalue().strip().splitlines() or [str(error)]
        raise _FlagError(lines[-1]) from None
    args.model = model
    additional = dict(args.additional_config or {})
    asked = additional.pop("spindle", None)
    args.additional_config = additional
    return AsyncEngineArgs.from_cli_args(args).create_engine_config(), asked


def _first_line(error: Exception) -> str:
    """The line of a message that says most: pydantic puts a heading above it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and "validation error" in lines[0]:
        return lines[1]
    return lines[0] if lines else type(error).__name__
