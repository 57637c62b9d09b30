"""Refuse to patch a vLLM that does not look as expected, by name."""

import inspect
from collections.abc import Callable
from typing import Any

APPLIED = "__vllm_spindle_patch__"


class PatchMismatchError(RuntimeError):
    """This vLLM does not have the symbol, or not in the form, that a patch relies on."""


def require_parameters(owner: Any, name: str, *parameters: str) -> Callable[..., Any]:
    """The callable ``owner.name``, once it is seen to take all the named parameters.

    Raises:
        PatchMismatchError: naming the symbol and what is missing.
    """
    where = f"{getattr(owner, '__module__', '')}.{getattr(owner, '__qualname__', owner.__name__)}"
    function = getattr(owner, name, None)
    if function is None:
        raise PatchMismatchError(f"vLLM has no {where.lstrip('.')}.{name} (looked for by a patch)")
    missing = set(parameters) - set(inspect.signature(function).parameters)
    if missing:
        raise PatchMismatchError(
            f"{where.lstrip('.')}.{name} takes no parameter {', '.join(sorted(missing))}: "
            "this vLLM does not fit the patch"
        )
    return function


def is_applied(function: Any) -> bool:
    """Whether this is one of our own wrappers."""
    return getattr(function, APPLIED, False)


def mark_applied(function: Any) -> Any:
    """Mark a wrapper, so that applying a patch twice changes nothing."""
    setattr(function, APPLIED, True)
    return function
