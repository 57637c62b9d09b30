"""Exact answers of the shapes model on held-out questions, per type and kind, in percent.

    .venv/bin/python models/shapes/evaluate.py --model models/shapes

Answers are generated greedily in transformers; an answer counts only if its word is right and
``</s>`` comes right after. ``--tokens`` says which visual tokens the language model gets: ``all``,
``asked`` (the asked things' centres), ``unasked`` (all but the cells that see an asked thing), a
number (that many: the asked centres, the rest drawn at random), or ``none``.
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
    cells = range(scenes.NUM_CELLS)
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


@torch.inference_mode()
def answers(
    model: LlavaForConditionalGeneration,
    processor: AutoProcessor,
    questions: list[shapes.Question],
    tokens: str,
) -> list[str]:
    """Greedy answers, one question at a time."""
    image_id = model.config.image_token_index
    texts = []
    for question in questions:
        inputs = processor(
            images=scenes.draw(question.scene), text=question.prompt, return_tensors="pt"
        )
        features: Tensor = model.model.get_image_features(
            inputs["pixel_values"].to(model.dtype)
        ).pooler_output[0]
        cells = kept_cells(question, tokens)
        ids = inputs["input_ids"][0]
        start = int((ids == image_id).nonzero()[0])
        embeds = model.get_input_embeddings()(ids)
        end = start + scenes.NUM_CELLS
        embeds = torch.cat((embeds[:start], features[cells], embeds[end:]))[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        generated = model.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=shapes.MAX_NEW_TOKENS
        )
        texts.append(processor.tokenizer.decode(generated[0], skip_special_tokens=True))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--num-questions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--tokens", default="all")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(args.model)
    model = LlavaForConditionalGeneration.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype)
    ).eval()
    questions = shapes.make_questions(args.num_questions, seed=args.seed)
    right: dict[str, list[bool]] = defaultdict(list)
    for question, text in zip(
        questions, answers(model, processor, questions, args.tokens), strict=True
    ):
        is_right = shapes.is_exact(text, question)
        for key in (question.type, f"{question.type}: {question.kind}", "~all"):
            right[key].append(is_right)
    print(f"{args.model} {args.dtype}, tokens {args.tokens}, seed {args.seed}")
    for key, values in sorted(right.items()):
        print(f"{key:24s} {100 * sum(values) / len(values):6.1f}  of {len(values)}")


if __name__ == "__main__":
    main()
