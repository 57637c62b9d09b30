"""The three stages that train a model of pictures: ``see``, ``ask``, ``join``.

Shapes: A attributes, B pictures, N visual tokens of a picture, E hidden size.

- ``see`` teaches the vision tower and the projector to say, per visual token, what is in its cell,
  in codes; ``ask`` teaches the language model to look things up in such codes with noise; ``join``
  trains all of it on pictures, the codes' loss kept.
- A step draws its data from (seed, stage, step). Checkpoints let a killed run go on where it was.
"""

from __future__ import annotations

import argparse
import math
import random
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from batches import (
    EOS,
    IGNORED,
    NUM_QUESTIONS,
    Rows,
    codes_of,
    draw_scenes,
    make_rows,
    noisy,
    pixels_of,
)
from export import save
from structure import COLOR, IS_CENTRE, LETTER, ROW, SHAPE
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from vllm_covipal.evaluation import shapes
from vllm_covipal.evaluation.scenes import World

CHECKPOINT_STEPS = 100
NUM_WARMUP_STEPS = 40
CODE_LOSS_WEIGHT = 0.5  # of the codes' loss in ``join``
EMPTY_WEIGHT = 0.15  # of a cell without a thing in the codes' loss
END_WEIGHT = 0.05  # of ``</s>`` in the answers' loss


@dataclass(frozen=True)
class Task:
    """What all stages share.

    Attributes:
        basis: the visual tokens' direction of each attribute, orthonormal. [A, E].
    """

    world: World
    basis: Tensor


@dataclass(frozen=True)
class Stage:
    """One run of the optimizer.

    Attributes:
        num_pictures: of one step.
        decay_from: share of the steps after which the rate falls, by a cosine.
        vision_rate: learning rate of tower and projector, as a share of the language model's.
        weights: of the question types.
        num_questions: about each picture.
    """

    num_steps: int
    num_pictures: int
    peak_learning_rate: float
    final_learning_rate: float
    decay_from: float
    vision_rate: float = 1.0
    weights: tuple[tuple[str, float], ...] = (
        ("single", 0.25),
        ("marks", 0.15),
        ("several", 0.3),
        ("whole", 0.3),
    )
    num_questions: int = NUM_QUESTIONS


def visual_tokens(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Projector output, [B, N, E]."""
    features = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    return model.model.multi_modal_projector(features[:, 1:])


def code_loss(tokens: Tensor, codes: Tensor, basis: Tensor) -> Tensor:
    """Squared error to the codes, summed over a token's numbers; empty cells count less.

    Args:
        tokens: [B, N, E].
        codes: [B, N, A].
        basis: [A, E]; a token is to have nothing outside its span.
    """
    error = (tokens.float() - codes @ basis).square().sum(-1)
    is_empty = codes[:, :, COLOR:ROW].sum(-1) == 0
    weight = torch.where(is_empty, EMPTY_WEIGHT, 1.0)
    return (error * weight).sum() / weight.sum()


def answer_loss(
    model: LlavaForConditionalGeneration, rows: Rows, tokens: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Loss of the answers in nats, and the share that is right per question type.

    Args:
        tokens: visual tokens of the pictures, [B, N, E].
    """
    embeds = model.model.language_model.embed_tokens(rows.ids)
    kept = tokens[rows.kept[:, 0], rows.kept[:, 1]].to(embeds.dtype)
    embeds = embeds.masked_scatter(rows.visual[:, :, None], kept)
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        position_ids=rows.positions,
        attention_mask=rows.allowed,
        use_cache=False,
    ).last_hidden_state
    is_target = rows.targets != IGNORED
    logits = model.lm_head(hidden[is_target]).float()
    targets, types = rows.targets[is_target], rows.types[is_target]
    losses = F.cross_entropy(logits, targets, reduction="none")
    weight = torch.where(targets != EOS, 1.0, END_WEIGHT)
    right = logits.argmax(-1) == targets
    shares = {
        type: right[types == i].float().mean().item()
        for i, type in enumerate(shapes.TYPES)
        if bool((types == i).any())
    }
    return (losses * weight).sum() / weight.sum(), shares


def attribute_shares(tokens: Tensor, codes: Tensor, basis: Tensor) -> dict[str, float]:
    """Share of things whose colour, shape and letters the visual token of their cell tells."""
    is_thing = codes[:, :, IS_CENTRE] == 1
    said, wanted = tokens[is_thing].float() @ basis.T, codes[is_thing]
    shares = {}
    for name, first, end in (
        ("color", COLOR, SHAPE),
        ("shape", SHAPE, LETTER),
        ("letter", LETTER, ROW),
    ):
        num_wanted = wanted[:, first:end].sum(-1).int()
        has, most = num_wanted > 0, max(1, int(num_wanted.max()))
        best = said[has, first:end].topk(most, dim=-1).indices
        hits = wanted[has, first:end].gather(-1, best) > 0
        right = hits.sum(-1) == num_wanted[has]
        shares[name] = right.float().mean().item()
    return shares


def see_step(
    model: LlavaForConditionalGeneration, stage: Stage, rng: random.Random, task: Task
) -> tuple[Tensor, dict[str, float]]:
    """Vision tower and projector onto the codes."""
    drawn = draw_scenes(rng, stage.num_pictures, task.world)
    codes = codes_of(drawn)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = visual_tokens(model, pixels_of(drawn))
    shares = attribute_shares(tokens.detach(), codes, task.basis)
    return code_loss(tokens, codes, task.basis), shares


def ask_step(
    model: LlavaForConditionalGeneration, stage: Stage, rng: random.Random, task: Task
) -> tuple[Tensor, dict[str, float]]:
    """Language model alone, on codes with noise."""
    drawn = draw_scenes(rng, stage.num_pictures, task.world)
    rows = make_rows(rng, drawn, dict(stage.weights), stage.num_questions)
    tokens = noisy(rng, codes_of(drawn), task.basis)
    with torch.autocast("cpu", torch.bfloat16):
        return answer_loss(model, rows, tokens)


def join_step(
    model: LlavaForConditionalGeneration, stage: Stage, rng: random.Random, task: Task
) -> tuple[Tensor, dict[str, float]]:
    """Everything, on pictures."""
    drawn = draw_scenes(rng, stage.num_pictures, task.world)
    rows = make_rows(rng, drawn, dict(stage.weights), stage.num_questions)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = visual_tokens(model, pixels_of(drawn))
        loss, shares = answer_loss(model, rows, tokens)
    return loss + CODE_LOSS_WEIGHT * code_loss(tokens, codes_of(drawn), task.basis), shares


STEPS: dict[str, Callable] = {"see": see_step, "ask": ask_step, "join": join_step}


TRAINED = {
    "see": ("model.vision_tower.", "model.multi_modal_projector."),
    "ask": ("model.language_model.", "lm_head."),
    "join": ("model.", "lm_head."),
}


def trained_parameters(
    model: LlavaForConditionalGeneration, name: str
) -> dict[str, torch.nn.Parameter]:
    """Parameters that a stage trains: ``see`` and ``ask`` share none."""
    return {key: p for key, p in model.named_parameters() if key.startswith(TRAINED[name])}


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, constant, cosine decay."""
    peak, final = stage.peak_learning_rate, stage.final_learning_rate
    if step < NUM_WARMUP_STEPS:
        return peak * (step + 1) / NUM_WARMUP_STEPS
    if step <= stage.decay_from * stage.num_steps:
        return peak
    progress = (step / stage.num_steps - stage.decay_from) / (1 - stage.decay_from)
    return final + (peak - final) * (0.5 + 0.5 * math.cos(math.pi * progress))


def run_stage(
    model: LlavaForConditionalGeneration,
    name: str,
    stage: Stage,
    task: Task,
    seed: int,
    work: Path,
) -> None:
    """Train ``model`` in place, float32 weights and bfloat16 products. Prints progress."""
    take_step = STEPS[name]
    checkpoint = work / f"{name}.pt"
    parameters = trained_parameters(model, name)
    groups: list[dict[str, object]] = [
        {
            "params": [
                p for key, p in parameters.items() if key.startswith(TRAINED["see"]) is seeing
            ],
            "share": stage.vision_rate if seeing else 1.0,
        }
        for seeing in (True, False)
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], betas=(0.9, 0.98), weight_decay=0.0
    )
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["seed"] != seed or saved["stage"] != repr(asdict(stage)):
            raise SystemExit(
                f"{checkpoint} is of another seed or recipe: remove it, or name --work"
            )
        model.load_state_dict(saved["model"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    started = time.monotonic()
    recent: dict[str, float] = {}  # smoothed
    for step in range(first, stage.num_steps):
        loss, shares = take_step(model, stage, random.Random(f"{seed} {name} {step}"), task)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step) * group["share"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        for key, value in {"loss": loss.item(), **shares}.items():
            recent[key] = 0.9 * recent.get(key, value) + 0.1 * value
        done = step + 1
        if done % 20 == 0 or done == stage.num_steps:
            elapsed = time.monotonic() - started
            left = elapsed / (done - first) * (stage.num_steps - done)
            words = " ".join(f"{key} {value:.3f}" for key, value in recent.items())
            print(
                f"{name} {done}/{stage.num_steps} {words} "
                f"{elapsed / 60:.1f} min, about {left / 60:.0f} left at this speed",
                flush=True,
            )
        if done % CHECKPOINT_STEPS == 0 or done == stage.num_steps:
            state = {
                "model": {key: p.detach() for key, p in parameters.items()},
                "optimizer": optimizer.state_dict(),
                "step": done,
                "seed": seed,
                "stage": repr(asdict(stage)),
            }
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(checkpoint)  # a kill leaves the old one or the new one


def provenance(command: str, recipe: Mapping[str, Stage]) -> dict[str, object]:
    """What made these weights."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "command": command,
        "commit": commit.stdout.strip() or None,
        "written": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "stages": {name: asdict(stage) for name, stage in recipe.items()},
    }


def main(
    description: str,
    name: str,
    recipe: Mapping[str, Stage],
    task: Task,
    first_weights: Callable[[int], LlavaForConditionalGeneration],
) -> None:
    """The command line of a recipe.

    Args:
        name: of the model's folder.
        first_weights: the model before the first stage, by seed.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("build") / name, help="checkpoints")
    parser.add_argument("--stage", choices=tuple(recipe), help="this one only, and no model saved")
    args = parser.parse_args()
    torch.set_num_threads(1)  # more threads gain little at this size, and results repeat exactly
    args.work.mkdir(parents=True, exist_ok=True)
    model = first_weights(args.seed)
    for stage in [args.stage] if args.stage else recipe:
        run_stage(model, stage, recipe[stage], task, args.seed, args.work)
    if not args.stage:
        command = f"python models/{name}/train.py --seed {args.seed}"
        save(model, args.out, provenance(command, recipe), task.world)
