"""The training run: stage 1, stage 2, checkpoints on the way, the finished module in ``out``.

Notable:
- A step's samples, questions, budgets and noise are drawn from (seed, stage, step, process).
  A resumed run therefore goes on as the killed one would have.
- Under accelerate: device, mixed precision, and data parallelism (``accelerate launch -m
  vllm_covipal.cli train ...``). The LVLM is whole on every device; only the module is wrapped.
"""

import math
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vllm_covipal.bench.provenance import provenance
from vllm_covipal.core.fingerprint import fingerprint
from vllm_covipal.core.pruner import PruningModule, PruningModuleConfig
from vllm_covipal.core.pruner_files import load_pruning_module, save_pruning_module
from vllm_covipal.training import checkpoint, stages
from vllm_covipal.training.checkpoint import Progress
from vllm_covipal.training.checks import check_pictures, check_types
from vllm_covipal.training.curves import Curve
from vllm_covipal.training.data import draw_turns, drawn_samples
from vllm_covipal.training.divergence import DivergenceCheck
from vllm_covipal.training.encode import Encoder
from vllm_covipal.training.folder_lock import alone_in
from vllm_covipal.training.lvlm import decoder, default_guide_layer
from vllm_covipal.training.recipe import StageRecipe, TrainRecipe
from vllm_covipal.training.samples import Sample, Source, Turn

NUM_READERS = 2
WITHOUT_WEIGHTS = {"spread_share", "spread_by"}
"""Dials of the module that say how it is used: no training depends on them."""

Report = Callable[[int, int, int, dict[str, float]], None]
"""(stage, steps done, steps in all, what to show)."""


@dataclass(frozen=True, slots=True)
class Run:
    """What stays the same over a run."""

    recipe: TrainRecipe
    model: Any
    encoder: Encoder
    source: Source
    accelerator: Any
    out: Path
    guide_layer: int
    made_by: dict[str, Any]


def make_accelerator(recipe: TrainRecipe) -> Any:
    """accelerate's, or a plain error where it is not installed.

    Raises:
        ValueError: if accelerate is missing.
    """
    try:
        from accelerate import Accelerator
    except ImportError:
        raise ValueError("training needs accelerate: pip install 'vllm-spindle[train]'") from None
    return Accelerator(mixed_precision=recipe.mixed_precision)


def train(
    recipe: TrainRecipe,
    model: Any,
    processor: Any,
    source: Source,
    accelerator: Any,
    *,
    model_name: str = "",
    restart: bool = False,
    report: Report | None = None,
) -> PruningModule:
    """Run both stages, from the last checkpoint if there is one.

    Args:
        recipe: all dials.
        model: the LVLM, frozen.
        processor: its processor.
        source: samples.
        accelerator: from ``make_accelerator``.
        model_name: the LVLM's, for the module's configuration and card.
        restart: drop what is in the folder.
        report: called after every step, on the main process.

    Returns:
        The finished module, also in ``recipe.out``.

    Raises:
        ValueError: if the folder holds another run, or a dial does not fit the model.
    """
    out = Path(recipe.out)
    guide_layer = _guide_layer(recipe, model)
    check_types(recipe, source)
    with _own_folder(out, accelerator, restart=restart):
        started, started_on_cpu = time.perf_counter(), time.process_time()
        model.to(accelerator.device)
        progress = checkpoint.last_progress(out, recipe, accelerator.num_processes, source.digest)
        module = _new_module(recipe, model, model_name)
        if progress:
            checkpoint.load_module(out, progress, module)
        encoder = Encoder(
            model,
            processor,
            max_text_tokens=module.config.max_text_tokens,
            max_answer_tokens=recipe.max_answer_tokens,
        )
        made_by = provenance() | {"command": " ".join(["vllm-covipal", *sys.argv[1:]])}
        made_by["recipe"] = recipe.model_dump(mode="json", exclude={"out"})
        made_by["data_digest"] = source.digest
        made_by["num_processes"] = accelerator.num_processes
        run = Run(recipe, model, encoder, source, accelerator, out, guide_layer, made_by)
        check_pictures(
            recipe,
            source,
            progress,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        for stage in (1, 2):
            if progress and progress.stage > stage:
                continue
            resumed = progress if progress and progress.stage == stage else None
            _run_stage(run, module, stage, resumed, report)
        if accelerator.is_main_process:
            seconds = {
                "clock": round(time.perf_counter() - started, 1),
                "processor": round(time.process_time() - started_on_cpu, 1),
                "goes_on_from": asdict(progress) if progress else None,
            }
            with checkpoint.writing(out):
                save_pruning_module(module, out)
                checkpoint.write_json(out / "provenance.json", made_by | {"seconds": seconds})
        accelerator.wait_for_everyone()
        return module


@contextmanager
def _own_folder(out: Path, accelerator: Any, *, restart: bool) -> Iterator[None]:
    """The run's folder, made and held by the main process, on every process once that is done."""
    with ExitStack() as held:
        if accelerator.is_main_process:
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"out={out}: cannot make the folder ({error.strerror})") from None
            held.enter_context(alone_in(out))
            if restart:
                shutil.rmtree(out / checkpoint.FOLDER, ignore_errors=True)
        accelerator.wait_for_everyone()
        yield


def _guide_layer(recipe: TrainRecipe, model: Any) -> int:
    given = recipe.stage1.guide_layer
    num_layers = len(decoder(model).layers)
    if given is not None and given >= num_layers:
        raise ValueError(f"stage1.guide_layer must be in [0, {num_layers}), got {given}")
    return default_guide_layer(model) if given is None else given


def _new_module(recipe: TrainRecipe, model: Any, model_name: str) -> PruningModule:
    if recipe.init:
        module = load_pruning_module(
            recipe.init, fingerprint=fingerprint(model.config), model_name=model_name
        ).requires_grad_(True)
        module.config = _as_asked(module.config, recipe)
        return module
    text = model.config.get_text_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return PruningModule(
            PruningModuleConfig.for_hidden_size(
                text.hidden_size,
                fingerprint=fingerprint(model.config),
                trained_for=model_name or recipe.model,
                max_text_tokens=recipe.max_text_tokens,
                **recipe.module.sizes(),
            )
        )


def _as_asked(config: PruningModuleConfig, recipe: TrainRecipe) -> PruningModuleConfig:
    """The configuration of ``init``, with the recipe's word on what its weights leave open."""
    said = recipe.module.model_dump(exclude_unset=True, exclude_none=True)
    for name in said.keys() - WITHOUT_WEIGHTS:
        if said[name] != getattr(config, name):
            raise ValueError(
                f"module.{name}={said[name]}, but the module to start from, init={recipe.init}, "
                f"has {getattr(config, name)}: leave it out, or start without init"
            )
    changes = {name: said[name] for name in said.keys() & WITHOUT_WEIGHTS}
    if "max_text_tokens" in recipe.model_fields_set:
        changes["max_text_tokens"] = recipe.max_text_tokens
    return replace(config, **changes)


def _run_stage(
    run: Run,
    module: PruningModule,
    stage: int,
    resumed: Progress | None,
    report: Report | None,
) -> None:
    """One run of the optimizer, ``module`` in place."""
    recipe: StageRecipe = run.recipe.stage1 if stage == 1 else run.recipe.stage2
    accelerator = run.accelerator
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    wrapped, optimizer = accelerator.prepare(module, optimizer)
    first = 0
    if resumed:
        first = resumed.step
        checkpoint.load_optimizer(run.out, resumed, optimizer, accelerator.scaler)
    _set_recomputation(run, stage)
    curve = Curve(run.out / f"stage{stage}.csv", first) if accelerator.is_main_process else None
    digest = checkpoint.recipe_digest(run.recipe, stage)
    watch = DivergenceCheck(stage, has_scaler=accelerator.scaler is not None)
    with _Reader(run, stage, recipe, first) as reader:
        for step in range(first, recipe.num_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step)
            outcome = _step(run, wrapped, stage, recipe, step, reader.take(step))
            optimizer.zero_grad()
            accelerator.backward(outcome.loss)
            norm = accelerator.clip_grad_norm_(wrapped.parameters(), recipe.max_grad_norm)
            watch.look(step, outcome.loss, norm)
            optimizer.step()
            done = step + 1
            shown = _over_processes(accelerator, outcome)
            if curve and step % run.recipe.log_steps == 0:
                with checkpoint.writing(run.out / f"stage{stage}.csv"):
                    curve.append(step, shown | {"learning_rate": learning_rate(recipe, step)})
            at_end = done == recipe.num_steps
            if done % run.recipe.checkpoint_steps == 0 or at_end:
                if accelerator.is_main_process:
                    here = Progress(
                        stage, done, digest, accelerator.num_processes, run.source.digest
                    )
                    bare = accelerator.unwrap_model(wrapped)
                    # Before the checkpoint: a run that goes on from it takes no step of stage 1.
                    if at_end and stage == 1:
                        _save_stage_1(run, here, bare)
                    checkpoint.save_checkpoint(
                        run.out, here, bare, optimizer, accelerator.scaler, run.made_by
                    )
                accelerator.wait_for_everyone()
            if report and accelerator.is_main_process:
                report(stage, done, recipe.num_steps, shown)
    accelerator.free_memory()


def _save_stage_1(run: Run, progress: Progress, module: PruningModule) -> None:
    folder = run.out / "stage1"
    with checkpoint.writing(folder):
        save_pruning_module(module, folder)
        made_by = run.made_by | {"progress": asdict(progress)}
        checkpoint.write_json(folder / "provenance.json", made_by)


def _step(
    run: Run, scorer: Any, stage: int, recipe: StageRecipe, step: int, drawn: list[Any]
) -> stages.Outcome:
    samples = [run.encoder(sample, turns) for sample, turns in drawn]
    with run.accelerator.autocast():
        if stage == 1:
            return stages.stage1_step(
                run.model, scorer, samples, run.recipe.stage1, run.guide_layer
            )
        generator = torch.Generator()
        generator.manual_seed(random.Random(_seed(run, stage, step, "noise")).getrandbits(60))
        progress = step / max(1, recipe.num_steps - 1)
        return stages.stage2_step(
            run.model,
            scorer,
            samples,
            run.recipe.stage2,
            progress=progress,
            generator=generator,
            guide=(run.recipe.stage1, run.guide_layer),
        )


def _seed(run: Run, stage: int, step: int, what: str) -> str:
    return f"{run.recipe.seed} {stage} {step} {run.accelerator.process_index} {what}"


class _Reader:
    """Reads the next step's samples while this one computes."""

    def __init__(self, run: Run, stage: int, recipe: StageRecipe, first: int) -> None:
        self._run, self._stage, self._recipe = run, stage, recipe
        self._pool = ThreadPoolExecutor(NUM_READERS)
        self._ahead: list[Future[tuple[Sample, list[Turn]]]] = self._start(first)

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *error: Any) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self, step: int) -> list[tuple[Sample, list[Turn]]]:
        """Samples of this step with the questions drawn, the next step's under way."""
        ready = self._ahead
        self._ahead = self._start(step + 1)
        return [future.result() for future in ready]

    def _start(self, step: int) -> list[Future[tuple[Sample, list[Turn]]]]:
        run = self._run
        if step >= self._recipe.num_steps:
            return []
        own = drawn_samples(
            run.recipe,
            self._stage,
            step,
            len(run.source),
            process_index=run.accelerator.process_index,
            num_processes=run.accelerator.num_processes,
        )
        rng = random.Random(_seed(run, self._stage, step, "questions"))
        return [self._pool.submit(self._read, index, rng.getrandbits(60)) for index in own]

    def _read(self, index: int, seed: int) -> tuple[Sample, list[Turn]]:
        sample = self._run.source[index]
        count = min(self._recipe.questions, len(sample.turns))
        return sample, draw_turns(sample.turns, count, self._recipe.type_weights, seed=seed)


def learning_rate(recipe: StageRecipe, step: int) -> float:
    """Linear rise, then a cosine down to the final rate at the last step."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    highest = max(0, recipe.warmup_steps - 1)
    span = max(1, recipe.num_steps - 1 - highest)
    share = 0.5 + 0.5 * math.cos(math.pi * (step - highest) / span)
    return recipe.final_learning_rate + share * (recipe.learning_rate - recipe.final_learning_rate)


def _set_recomputation(run: Run, stage: int) -> None:
    """Recompute layers in the backward pass; transformers does so in training mode only."""
    if run.recipe.gradient_checkpointing and stage == 2:
        run.model.gradient_checkpointing_enable({"use_reentrant": False})
        decoder(run.model).train()


def _over_processes(accelerator: Any, outcome: stages.Outcome) -> dict[str, float]:
    shown = {"loss": float(outcome.loss.detach())} | outcome.shown
    if accelerator.num_processes == 1:
        return shown
    values = torch.tensor(list(shown.values()), device=accelerator.device)
    means = accelerator.reduce(values, reduction="mean").tolist()
    return dict(zip(shown, means, strict=True))
