"""Other papers' methods in transformers, one file each, for comparison on the evaluation's terms.

``OUTSIDE``: what the language model gets is decided before it runs, so the budget is exact.
(model, encoded prompt, keep ratio) -> pruned prompt.

``INSIDE``: the language model drops tokens on its way up, after it has run some layers on more.
(model, encoded prompt, keep ratio, new tokens) -> (token ids, visual tokens a layer saw, on
average). Each in two budgets: by name alone, the average over layers is the ratio; with "final",
the last layers keep the ratio and the first ones cost more.

What a server can run is in ``selectors/``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from vllm_covipal.baselines import fastv, pooling, pyramid_drop, sparsevlm, visionzip
from vllm_covipal.baselines.inside import Unreachable
from vllm_covipal.hf import EncodedPrompt, PrunedPrompt

__all__ = ["INSIDE", "OUTSIDE", "Unreachable"]

OUTSIDE: dict[str, Callable[[Any, EncodedPrompt, float], PrunedPrompt]] = {
    "average pooling": pooling.pool_prompt,
    "visionzip": visionzip.prune_prompt,
}

INSIDE: dict[str, Callable[[Any, EncodedPrompt, float, int], tuple[list[int], float]]] = {
    name if is_average else f"{name}, final": partial(answer, is_average=is_average)
    for name, answer in (
        ("fastv", fastv.answer),
        ("pyramiddrop", pyramid_drop.answer),
        ("sparsevlm", sparsevlm.answer),
    )
    for is_average in (True, False)
}
