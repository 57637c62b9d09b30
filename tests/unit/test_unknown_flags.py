"""A flag that nobody knows: one line, which points to the help that lists the known ones."""

import pytest

from vllm_covipal import cli as covipal
from vllm_spindle import cli as spindle


@pytest.mark.parametrize(
    ("main", "arguments", "program"),
    [
        (spindle.main, ["bench", "kernel"], "vllm-spindle bench kernel"),
        (spindle.main, ["plan", "MODEL", "--prompt-len", "9"], "vllm-spindle plan"),
        (covipal.main, ["train", "--config", "FILE"], "vllm-covipal train"),
    ],
    ids=["nested", "spindle", "covipal"],
)
def test_the_line_names_the_commands_own_help(main, arguments, program, capsys) -> None:
    """Exit code 2, the flag, and the help of the command it was given to."""
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--wrong-flag", "1"])
    expected = f"{program}: unrecognized arguments: --wrong-flag 1 (see {program} --help)\n"
    assert (stop.value.code, capsys.readouterr().err) == (2, expected)


@pytest.mark.parametrize(
    ("main", "arguments", "near"),
    [
        (
            spindle.main,
            ["plan", "MODEL", "--prompt-len", "9", "--keep-ration", "1"],
            "--keep-ratio",
        ),
        (spindle.main, ["eval", "--method=full"], "--methods"),  # no abbreviations
        (covipal.main, ["eval", "--num-question", "5"], "--num-questions"),
    ],
    ids=["misspelt", "abbreviated", "covipal"],
)
def test_the_nearest_flag_is_named(main, arguments, near, capsys) -> None:
    """In the same line."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"; did you mean {near}? (see" in said and said.count("\n") == 1
