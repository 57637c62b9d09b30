"""Which of a prompt's queries score its context: integers, known before the data. No torch.

The window, the last W tokens, asks what the end of the prompt needs. Observers, up to M tokens
spread evenly over what stands before it from ``observed_from`` on, ask what the prompt itself came
back to, for questions that are yet to come. They lie in the last half of the prompt: few are enough
there, and what stands before them may come from the prefix cache, whose tokens nobody computes.
"""

from functools import lru_cache

import numpy as np

LEAST_SHARE = 4  # a prompt computes at least its last quarter for itself, cached or not


def first_observed(
    prompt_len: int, *, window: int, observers: int, prefix_tokens: int, shared_tokens: int
) -> int:
    """The first token that may observe; the prefix cache may hold what stands before it.

    Args:
        prompt_len: P.
        window: last tokens that always observe (W).
        observers: most others (M); with none it is the window's first token.
        prefix_tokens: protected first tokens: nobody asks for their scores.
        shared_tokens: first tokens that the reduction leaves as they were computed in every band.
    """
    own_len = prompt_len - prefix_tokens
    latest = max(0, prompt_len - window)
    if not observers:
        return latest
    latest = min(latest, prompt_len - own_len // LEAST_SHARE)
    return min(max(shared_tokens, prompt_len - own_len // 2), latest)


@lru_cache(maxsize=1024)
def observed_positions(prompt_len: int, *, window: int, observers: int, first: int) -> np.ndarray:
    """Tokens whose queries score, ascending; the last ``min(W, P)`` are the window. int64.

    One array for everybody who asks: not to be written to.

    Args:
        prompt_len: P.
        window: W.
        observers: M.
        first: from ``first_observed``.
    """
    start = max(0, prompt_len - window)
    count = min(observers, max(0, start - first))
    spread = first + np.arange(count, dtype=np.int64) * (start - first) // max(1, count)
    return np.concatenate([spread, np.arange(start, prompt_len, dtype=np.int64)])
