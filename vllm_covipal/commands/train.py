"""``vllm-covipal train``: a pruning module for an LVLM, from image-text samples, in two stages."""

import argparse
from pathlib import Path
from typing import Any

from vllm_covipal.training.recipe import TrainRecipe, leaves, load_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments: the recipe, and every dial of it by its dotted name."""
    parser.add_argument("--config", required=True, metavar="FILE", help="recipe (YAML)")
    parser.add_argument(
        "--restart", action="store_true", help="drop the checkpoints that are in the folder"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="read every sample and its pictures through, say what cannot be read, and train not",
    )
    dials = parser.add_argument_group("in place of the recipe's")
    for name, text in leaves().items():
        dials.add_argument(f"--{name}", dest=f"dial:{name}", metavar="V", help=_escaped(text))


def run(args: argparse.Namespace) -> int:
    """Train. Returns the exit code."""
    overrides = {
        key.removeprefix("dial:"): value
        for key, value in vars(args).items()
        if key.startswith("dial:") and value is not None
    }
    recipe = load_recipe(args.config, overrides)
    # torch and transformers load for seconds: what is wrong above is said before.
    import torch

    from vllm_covipal.training.data import open_source
    from vllm_covipal.training.loop import make_accelerator, train
    from vllm_covipal.training.lvlm import load_lvlm

    source = open_source(recipe.data)
    if args.check:
        return _check(recipe, source)
    if recipe.num_threads:
        torch.set_num_threads(recipe.num_threads)
    accelerator = make_accelerator(recipe)
    model, processor = load_lvlm(recipe.model, recipe.dtype)
    with _Display(accelerator.is_main_process) as display:
        train(
            recipe,
            model,
            processor,
            source,
            accelerator,
            model_name=Path(recipe.model).name,
            restart=args.restart,
            report=display.report,
        )
    if accelerator.is_main_process:
        written = sorted(path.name for path in Path(recipe.out).iterdir() if path.is_file())
        print(f"{recipe.out}: {', '.join(written)}")
    return 0


def _check(recipe: TrainRecipe, source: Any) -> int:
    """Say what is wrong with the data. Returns the exit code.

    Raises:
        ValueError: if a picture cannot be read.
    """
    from vllm_covipal.training.checks import check_types

    check_types(recipe, source)
    num_unreadable = 0
    for line in source.unreadable(range(len(source)), whole=True):
        print(line, flush=True)
        num_unreadable += 1
    if num_unreadable:
        raise ValueError(f"{num_unreadable} picture{'s' * (num_unreadable > 1)} cannot be read")
    path = recipe.data.path
    read = f"{len(source)} samples, every picture can be read"
    print(f"{path}: {read}" if path else f"{recipe.data.kind}: pictures are generated")
    return 0


class _Display:
    """A progress bar a stage on a terminal, a line every twenty steps elsewhere."""

    def __init__(self, is_shown: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        console = Console()
        self._is_terminal = console.is_terminal and is_shown
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=console,
            disable=not self._is_terminal,
        )
        self._tasks: dict[int, Any] = {}

    def __enter__(self) -> "_Display":
        self._bars.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bars.stop()

    def report(self, stage: int, done: int, total: int, values: dict[str, float]) -> None:
        """One step is done."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._is_terminal:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(f"stage {stage}", total=total, shown="")
            self._bars.update(self._tasks[stage], completed=done, shown=shown)
        elif done % 20 == 0 or done == total:
            print(f"stage {stage} {done}/{total}  {shown}", flush=True)


def _escaped(text: str) -> str:
    return text.replace("%", "%%")
