"""What was ever imported, out of the garbage collector's sight.

vLLM collects garbage several times at each start and end of an engine. Over all of its modules
that takes longer than most of what the tests do in between.
"""

import gc

_freeze = gc.freeze


def freeze_imports() -> None:
    """Call between engines: what is alive now stays. vLLM's own thawing has no effect after it."""
    gc.freeze = gc.unfreeze = _nothing
    _freeze()


def _nothing() -> None:
    pass
