"""Every dial of ``SpindleConfig`` as a command-line flag, read off the model itself."""

import argparse
from collections.abc import Collection
from typing import Any

import yaml

from vllm_spindle.config import SpindleConfig, load_config


def add_dials(parser: argparse.ArgumentParser, leave_out: Collection[str] = ()) -> None:
    """Add ``--config FILE`` and one flag per dial not in ``leave_out``; a flag wins over the file.

    A command that leaves a dial out may have a flag of its own by that name.
    """
    parser.set_defaults(
        dials=[name for name in SpindleConfig.model_fields if name not in leave_out]
    )
    group = parser.add_argument_group("options of spindle")
    group.add_argument("--config", metavar="FILE", help="YAML file of options, configs/spindle/")
    for name, field in SpindleConfig.model_fields.items():
        if name in leave_out:
            continue
        group.add_argument(
            "--" + name.replace("_", "-"),
            metavar="X",
            help=f"{field.description} (default: {field.default})".replace("%", "%%"),
        )


def read_dials(args: argparse.Namespace) -> SpindleConfig:
    """The configuration that the flags stand for.

    Raises:
        ValueError: as ``load_config``.
    """
    given: dict[str, Any] = {
        name: yaml.safe_load(text)
        for name in args.dials
        if (text := getattr(args, name)) is not None
    }
    if args.config is None:
        return load_config(given)
    return load_config(load_config(args.config).model_dump() | given)
