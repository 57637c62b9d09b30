"""Compiled code is kept on disk where numba finds a place for it."""

from collections.abc import Callable
from typing import Any

from numba import njit


def cached_njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit`` whose code is kept from one process to the next, if anything can be written.

    Numba asks ``NUMBA_CACHE_DIR``, the folder of the source and the user's cache; in a container
    whose file system is read-only it finds none, and would not even define the function.

    Args:
        options: of ``njit``.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:
            return njit(**options)(function)  # compiled again by every process

    return decorate
