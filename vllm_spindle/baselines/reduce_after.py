"""SpindleKV with ``reduce_after``: the answer's first tokens say what the prompt is needed for.

Decoded over the whole prompt, they choose together with its window. A server goes on from there; an
evaluation would then ask about the whole cache. So it takes them back and has every token of the
answer from the reduced cache, as in Lookahead Q-Cache (arXiv:2505.20334), which decodes its
lookahead from a reduced cache, too.
"""

from typing import Any

from typing_extensions import Self

from vllm_spindle.baselines.spindle import DEFAULT_BLOCK_SIZE, Spindle

NUM_TOKENS = 16


class ReduceAfter(Spindle):
    """``Spindle`` that waits for ``NUM_TOKENS`` of the answer, fewer if it ends before."""

    @classmethod
    def of(cls, *, block_size: int = DEFAULT_BLOCK_SIZE, **dials: Any) -> Self:
        return super().of(block_size=block_size, **{"reduce_after": NUM_TOKENS, **dials})
