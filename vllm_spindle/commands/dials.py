"""Every dial of ``SpindleConfig`` as a command-line flag, read off the model itself."""

import argparse
from typing import Any

import yaml

from vllm_spindle.config import SpindleConfig, load_config


def add_dials(parser: argparse.ArgumentParser) -> None:
    """Add ``--config FILE`` and one flag per dial; a flag wins over the file."""
    group = parser.add_argument_group("options of spindle")
    group.add_argument("--config", metavar="FILE", help="YAML file of options, configs/spindle/")
    for name, field in SpindleConfig.model_fields.items():
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
        for name in SpindleConfig.model_fields
        if (text := getattr(args, name)) is not None
    }
    if args.config is None:
        return load_config(given)
    return load_config(load_config(args.config).model_dump() | given)
