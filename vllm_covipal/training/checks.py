"""What is wrong with the samples of a run, found before its first step."""

from vllm_covipal.training.checkpoint import Progress
from vllm_covipal.training.data import drawn_samples
from vllm_covipal.training.recipe import TrainRecipe
from vllm_covipal.training.samples import Source


def check_types(recipe: TrainRecipe, source: Source) -> None:
    """See that there are questions of the types that the recipe weighs.

    Raises:
        ValueError: if not, naming the types that there are.
    """
    for name, stage in (("stage1", recipe.stage1), ("stage2", recipe.stage2)):
        unknown = sorted(set(stage.type_weights) - set(source.types))
        if unknown:
            known = ", ".join(sorted(source.types)) or "no types"
            raise ValueError(
                f"{name}.type_weights: no sample is of type {unknown[0]!r}; the data have {known} "
                f"(for none: --{name}.type_weights {{}})"
            )


def check_pictures(
    recipe: TrainRecipe,
    source: Source,
    progress: Progress | None,
    *,
    process_index: int,
    num_processes: int,
) -> None:
    """See that there are the pictures that this process is yet to draw.

    Their headers alone: a fraction of a millisecond each, where reading them through may take
    hours (``vllm-covipal train --check`` does).

    Raises:
        ValueError: if one cannot be read, naming the first and how many there are.
    """
    here = (progress.stage, progress.step) if progress else (1, 0)
    drawn = (
        index
        for stage, stage_recipe in ((1, recipe.stage1), (2, recipe.stage2))
        for step in range(stage_recipe.num_steps)
        if (stage, step) >= here
        for index in drawn_samples(
            recipe,
            stage,
            step,
            len(source),
            process_index=process_index,
            num_processes=num_processes,
        )
    )
    found = list(source.unreadable(drawn, whole=False))
    if found:
        more = len(found) - 1
        others = f"; and {more} more picture{'s' * (more > 1)}" if more else ""
        raise ValueError(f"{found[0]}{others} (vllm-covipal train --check lists all)")
