"""How a layer chooses, as the user configured it."""

from vllm_spindle.config import SpindleConfig
from vllm_spindle.core.choice import ChoiceRule
from vllm_spindle.core.eviction import GqaName


def choice_rule(config: SpindleConfig, *, seed: int = 0, gqa: GqaName | None = None) -> ChoiceRule:
    """The rule of a configuration.

    Args:
        config: the dials.
        seed: of the random score.
        gqa: in place of the configured one.
    """
    return ChoiceRule(
        score=config.score,
        pool_kernel=config.pool_kernel,
        gqa=gqa or config.gqa,
        seed=seed,
        window=config.window,
        last_query=config.last_query,
    )
