"""Ways to choose visual tokens, one file per method, by name.

Layer 1 of the house: stdlib, torch and core. To add a method: its file, its row here, its slow
twin and tests, one README line.
"""

from collections.abc import Callable

from vllm_covipal.core.pruner import PruningModule
from vllm_covipal.selectors.base import Selector
from vllm_covipal.selectors.cdpruner import CDPrunerSelector
from vllm_covipal.selectors.divprune import DivPruneSelector
from vllm_covipal.selectors.grid import GridSelector
from vllm_covipal.selectors.ppm import PpmSelector
from vllm_covipal.selectors.random import RandomSelector

__all__ = ["SELECTOR_NAMES", "Selector", "build_selector", "uses_text"]

TRAINING_FREE: dict[str, Callable[[int], Selector]] = {
    "random": RandomSelector,
    "grid": lambda seed: GridSelector(),
    "divprune": lambda seed: DivPruneSelector(),
    "cdpruner": lambda seed: CDPrunerSelector(),
}
"""name -> what makes the selector from a seed."""

SELECTOR_NAMES = ("ppm", *TRAINING_FREE)

READS_TEXT = frozenset(
    {PpmSelector.name, *(name for name, make in TRAINING_FREE.items() if make(0).uses_text)}
)


def uses_text(name: str) -> bool:
    """Whether that selector's choice may depend on the text context."""
    return name in READS_TEXT


def build_selector(
    name: str, *, pruning_module: PruningModule | None = None, seed: int = 0
) -> Selector:
    """The selector of that name.

    Args:
        name: one of ``SELECTOR_NAMES``.
        pruning_module: what ``ppm`` scores with; the others take none.
        seed: of ``random``.

    Raises:
        ValueError: if the name is unknown, or ``ppm`` comes without a pruning module.
    """
    if name == "ppm":
        if pruning_module is None:
            raise ValueError("selector 'ppm' needs a pruning module: give the path of one")
        return PpmSelector(pruning_module)
    if name not in TRAINING_FREE:
        raise ValueError(f"selector must be one of {', '.join(SELECTOR_NAMES)}, got {name!r}")
    return TRAINING_FREE[name](seed)
