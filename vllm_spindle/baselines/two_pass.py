"""SpindleKV with the prompt read twice: its second reading, behind the first, does the scoring.

Every query of the second reading has seen the whole prompt, so tokens are kept for whatever the
prompt itself would look up if it were asked anything, as in KVzip (arXiv:2505.23416); scores,
turns and budgets are ours. A second prefill is the price. Offline only.
"""

from dataclasses import dataclass

from vllm_spindle.baselines.spindle import Spindle


@dataclass(frozen=True)
class TwoPass(Spindle):
    """``Spindle``, whose observers are all tokens of the second reading."""

    reads_twice = True
