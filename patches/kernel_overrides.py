"""Hook: a second engine may start in a process that has imported llvmlite.

To put the CPU's functions in the place of Triton kernels, vLLM looks through whatever every module
holds. llvmlite has an object that answers any name with a function of its library, ``__dict__``
too, at which the search ends in an error. None of its modules holds a kernel of vLLM's.
"""

import functools
import sys
from types import SimpleNamespace
from typing import Any

from vllm.triton_utils import dispatcher

from vllm_spindle_patches.guard import is_applied, mark_applied, require_parameters

HIDDEN = "llvmlite"


def apply() -> None:
    """Look through all modules but llvmlite's."""
    stock = require_parameters(dispatcher, "_rebind_kernels", "overrides")
    if is_applied(stock):
        return

    @functools.wraps(stock)
    def _rebind_kernels(overrides: Any) -> None:
        modules = {k: v for k, v in sys.modules.items() if k.partition(".")[0] != HIDDEN}
        seen = dispatcher.sys
        dispatcher.sys = SimpleNamespace(modules=modules)  # type: ignore[assignment]
        try:
            stock(overrides)
        finally:
            dispatcher.sys = seen

    dispatcher._rebind_kernels = mark_applied(_rebind_kernels)
