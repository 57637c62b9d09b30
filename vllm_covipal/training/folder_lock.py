"""One training at a time in a folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder; the system lets it go when the process ends, however it ends.

    Raises:
        ValueError: if another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)  # of the folder itself: no file is left in it
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"another training is writing to {folder}: wait, or give another out"
        ) from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(descriptor)
