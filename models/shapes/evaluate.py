"""Exact answers of the shapes model on held-out questions, per type and kind, in percent.

    .venv/bin/python models/shapes/evaluate.py --model models/shapes --tokens all 14 7 unasked none

Prints a table: one row per kind of question, one column per setting of ``--tokens``, which says
what visual tokens the language model gets: ``all``, ``asked`` (the asked things' centres),
``unasked`` (all but the cells that see an asked thing), a number (that many: the asked centres, the
rest drawn at random), or ``none``. Tokens that are left out leave no gap in the positions.

An answer counts only if greedy decoding gives its words and ``</s>`` right after: that is so
exactly when each of these is the likeliest token after what comes before it, so one pass tells.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vllm_covipal.evaluation import scenes, shapes

SEED = 1_000_003


def kept_cells(question: shapes.Question, tokens: str) -> list[int]:
    """Cells whose visual tokens the language model gets, ascending."""
    cells = range(question.scene.world.num_cells)
    if tokens == "all":
        return list(cells)
    if tokens == "none":
        return []
    if tokens == "asked":
        return list(question.cells)
    if tokens == "unasked":
        return [cell for cell in cells if cell not in question.touched_cells]
    others = [cell for cell in cells if cell not in question.cells]
    random.Random(f"{question.text} {question.scene.seed}").shuffle(others)
    return sorted([*question.cells, *others][: int(tokens)])


def is_right(
    model: LlavaForConditionalGeneration,
    ids: Tensor,
    features: Tensor,
    cells: list[int],
    num_said: int = 2,
) -> bool:
    """Whether greedy decoding says the last ``num_said`` of ``ids`` after the others.

    Args:
        ids: prompt, answer and ``</s>``. [T].
        features: visual tokens of the whole picture, [cells, E].
        cells: which of them the language model gets.
    """
    start = int((ids == model.config.image_token_index).nonzero()[0])
    embeds = model.get_input_embeddings()(ids)
    embeds = torch.cat((embeds[:start], features[cells], embeds[start + len(features) :]))
    logits = model(inputs_embeds=embeds[None, :-1]).logits[0, -num_said:]
    return torch.equal(logits.argmax(-1), ids[-num_said:])


@torch.inference_mode()
def table(
    model: LlavaForConditionalGeneration,
    processor: AutoProcessor,
    questions: list[shapes.Question],
    settings: list[str],
) -> dict[str, dict[str, list[bool]]]:
    """Kind of question -> setting -> right or wrong, question by question."""
    rights: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for question in questions:
        text = f"{question.prompt} {question.answer} {shapes.EOS}"
        inputs = processor(images=scenes.draw(question.scene), text=text, return_tensors="pt")
        pixels = inputs["pixel_values"].to(model.dtype)
        features = model.model.get_image_features(pixels).pooler_output[0]
        for tokens in settings:
            cells = kept_cells(question, tokens)
            num_said = len(question.answer.split()) + 1
            right = is_right(model, inputs["input_ids"][0], features, cells, num_said)
            for key in (question.type, f"{question.type}: {question.kind}", "~all"):
                rights[key][tokens].append(right)
    return rights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--num-questions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--tokens", nargs="+", default=["all"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--world", choices=tuple(scenes.WORLDS), default="shapes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(args.model)
    dtype = getattr(torch, args.dtype)
    model = LlavaForConditionalGeneration.from_pretrained(args.model, dtype=dtype).eval()
    world = scenes.WORLDS[args.world]
    questions = shapes.make_questions(args.num_questions, seed=args.seed, world=world)
    rights = table(model, processor, questions, args.tokens)
    print(f"{args.dtype}, seed {args.seed}")
    print(" | ".join(["", "type", "questions", *args.tokens, ""]).strip())
    for key, by_setting in sorted(rights.items()):
        shares = [f"{100 * sum(r) / len(r):.1f}" for r in by_setting.values()]
        num_asked = len(next(iter(by_setting.values())))
        print(" | ".join(["", key, str(num_asked), *shares, ""]).strip())


if __name__ == "__main__":
    main()
