"""Text to train and to measure on: the modules of Python's standard library, tests left out.

A file is held out or not by its name alone, so that nobody measures on what was trained on,
whatever the Python. Licence of the text: PSF-2.0.
"""

import sysconfig
import zlib
from pathlib import Path
from typing import Any

LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__"}
ONE_IN = 12  # files that are held out


def read_files(*, held_out: bool) -> list[str]:
    """Texts of the files, by path."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not LEFT_OUT & set(name.parts) and is_held_out(name.as_posix()) == held_out:
            found.append(path.read_text(encoding="utf-8", errors="replace"))
    return [text for text in found if text.strip()]


def tokenized_files(tokenizer: Any, *, held_out: bool) -> list[list[int]]:
    """Tokens of the files, no special ones added. tokenizer: of transformers."""
    texts = read_files(held_out=held_out)
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def is_held_out(name: str) -> bool:
    """Whether the file of this name under the library is never trained on."""
    return zlib.crc32(name.encode()) % ONE_IN == 0
