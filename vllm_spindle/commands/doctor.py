"""``vllm-spindle doctor``: can this vLLM, platform, model and flag set work, and if not, why."""

import argparse
import os
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_spindle.config import load_config


@dataclass(frozen=True)
class Check:
    """One row of the report.

    Attributes:
        name: what was looked at.
        finding: what was found, or what is wrong.
        way_out: what to do; empty if all is well.
    """

    name: str
    finding: str
    way_out: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether nothing needs to be done."""
        return not self.way_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, then the flags of ``vllm serve`` as they would be given there."""
    parser.usage = "%(prog)s [-h] [MODEL [vllm serve flags ...]]"
    parser.add_argument("model", metavar="MODEL", nargs="?", help="as for vllm serve")
    parser.add_argument(
        "flags",
        nargs=argparse.REMAINDER,
        metavar="flags",
        help="as for vllm serve, --additional-config included; without spindle in it, "
        "keep_ratio 0.25 is checked",
    )


def run(args: argparse.Namespace) -> int:
    """Print the checks. Returns 0 if all are well, else 1."""
    # vLLM's own chatter would bury the table; what goes wrong comes back as a check.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_spindle.commands.doctor_install import install_checks

    with Console(stderr=True).status("importing vLLM and looking around"):
        checks = install_checks()
        if all(check.is_ok for check in checks if check.name in ("vLLM", "patches", "platform")):
            checks += _serve_checks(args)
    print_checks(checks)
    return 0 if all(check.is_ok for check in checks) else 1


def _serve_checks(args: argparse.Namespace) -> list[Check]:
    if args.model is None:
        return []
    from vllm_spindle.commands.doctor_serve import serve_checks

    return serve_checks(args.model, args.flags, default=load_config({"keep_ratio": 0.25}))


def print_checks(checks: list[Check]) -> None:
    """A table, and one line that sums it up."""
    table = Table(show_lines=True)
    for title in ("", "check", "found", "way out"):
        table.add_column(title, overflow="fold")
    for check in checks:
        mark = Text("ok", "green") if check.is_ok else Text("no", "bold red")
        table.add_row(mark, check.name, Text(check.finding), Text(check.way_out))
    console = Console()
    console.print(table)
    num_bad = sum(not check.is_ok for check in checks)
    if num_bad:
        console.print(f"{num_bad} of {len(checks)} checks stand in the way", highlight=False)
    else:
        console.print(f"all {len(checks)} checks are fine: spindle can work here", highlight=False)
