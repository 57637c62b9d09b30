"""The console script ``vllm-spindle``: one table of subcommands, each imported only when it runs.

A command's module has ``add_arguments(parser)`` and ``run(args) -> exit code``. What it raises
as ``ValueError`` is the user's to mend: one line, exit code 2. ``RuntimeError`` says that
something it started failed: its message, exit code 1.
"""

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from typing import Any, NoReturn

PROGRAM = "vllm-spindle"

# name, module, one line of help
COMMANDS = (
    ("plan", "vllm_spindle.commands.plan", "what a keep ratio keeps of a prompt, band by band"),
    (
        "calibrate",
        "vllm_spindle.commands.calibrate",
        "evict, merge or both per band: measured on your prompts, written as a plan",
    ),
    (
        "profile",
        "vllm_spindle.commands.profile",
        "which kv heads need their tokens: measured, written beside the model for serving",
    ),
    (
        "doctor",
        "vllm_spindle.commands.doctor",
        "can this vLLM, model and flag set work, if not why",
    ),
    ("demo", "vllm_spindle.commands.demo", "a real vllm serve, stock against plugin, in numbers"),
    (
        "eval",
        "vllm_spindle.commands.eval",
        "what is lost: methods at equal true bytes, tasks, intervals",
    ),
    ("bench", "vllm_spindle.commands.bench", "measurements, stock and plugin in one run"),
)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line, without the usage.

    A flag has one name: what abbreviates it today is another flag's tomorrow.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but an unknown flag ends in its command, whose help has the known ones."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = next((word for word in unknown if word.startswith("--")), "").partition("=")[0]
            near = get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.75)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return known, unknown


def make_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser of every command; only the chosen one's module is imported, for its arguments."""
    parser = OneLineParser(
        PROGRAM, description="SpindleKV in vLLM: see what it does, and check it."
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {version(PROGRAM)}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module, text in COMMANDS:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == chosen:
            import_module(module).add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    args = make_parser(chosen).parse_args(arguments)
    module = {name: module for name, module, _ in COMMANDS}[args.command]
    try:
        return import_module(module).run(args)
    except ValueError as error:
        return _fail(args.command, error, 2)
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # its subclasses are other people's: bugs
            raise
        return _fail(args.command, error, 1)
    except KeyboardInterrupt:
        return 130


def _fail(command: str, error: Exception, code: int) -> int:
    print(f"{PROGRAM} {command}: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
