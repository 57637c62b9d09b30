"""Train the recall model: one CPU thread, data made on the fly; goes on where it was killed.

    .venv/bin/python models/recall/train.py --out models/recall

Notable:
- A sequence states dozens of chains and lists, then asks for most of them, so that it gives dozens
  of answers to learn from.
- Starts from ``structure.py``; lengths grow from 96 to 1,024 tokens.
- Position gaps between sentences show short sequences the distances of long ones.
- Statements are of the ``train`` split only; evaluation asks for the ``heldout`` split.
- Every CHECKPOINT_STEPS steps the state goes to ``build/recall.pt``; the same command goes on from
  there with the same draws.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from structure import structured_model
from torch import Tensor
from transformers import LlamaForCausalLM

from vllm_spindle.evaluation import needle, recall

NUM_STEPS = 2600
NUM_BATCH_TOKENS = 2560
NUM_WARMUP_STEPS = 40
PEAK_LEARNING_RATE = 1.4e-3
FINAL_LEARNING_RATE = 2e-5
DECAY_FROM = 0.55  # share of the steps after which the rate falls, by a cosine
OTHER_LOSS_WEIGHT = 0.1
MAX_POSITION = 2400  # positions reached through gaps
CHECKPOINT_STEPS = 100
CURRICULUM = (  # until this share of the steps, sequence lengths in tokens to draw from
    (0.05, (96,)),
    (0.12, (96, 192)),
    (0.30, (128, 256, 256, 512)),
    (0.60, (256, 512, 512, 1024)),
    (1.00, (256, 512, 1024, 1024)),
)
KINDS = ("variables", "values", "queries")
TOKEN_IDS = {token: i for i, token in enumerate(needle.VOCAB)}


@dataclass(frozen=True)
class Batch:
    """B sequences of T tokens.

    Attributes:
        ids: [B, T], int64.
        positions: [B, T], int64; jumps at the starts of sentences only.
        kinds: [B, T], int64; 1 + index into ``KINDS`` on the answer's tokens, 0 elsewhere.
    """

    ids: Tensor
    positions: Tensor
    kinds: Tensor


Asked = tuple[list[str], list[str], int]  # question, answer, index into KINDS


def make_statements(rng: random.Random, num_tokens: int) -> tuple[list[list[str]], list[Asked]]:
    """Shuffled statements of about ``num_tokens`` tokens, and what can be asked of them."""
    pool = recall.Pool(rng, "train")
    pairs: list[tuple[int, int]] = []
    asked: list[Asked] = []
    ends: list[tuple[int, int]] = []  # pairs to ask for by queries
    share_of_values = rng.choice((0.1, 0.3, 0.5))
    while len(pairs) * recall.NUM_STATEMENT_TOKENS < num_tokens and len(pool) > 120:
        if rng.random() < share_of_values:
            key, values = pool.values(rng.randint(2, 4))
            pairs += [(key, value) for value in values]
            asked.append((recall.question(key), [str(key)], 1))  # answered once shuffled
        else:
            nodes = pool.chain(rng.choice((1, 1, 1, 2, 2, 3, 4)))
            pairs += list(zip(nodes, nodes[1:], strict=False))
            if len(nodes) == 2 and rng.random() < 0.6:
                ends.append((nodes[0], nodes[1]))
            else:
                asked.append((recall.question(nodes[0]), recall.chain_answer(nodes[1:]), 0))
    rng.shuffle(pairs)
    for i, (question, answer, kind) in enumerate(asked):
        if kind == 1:
            values = [value for key, value in pairs if key == int(answer[0])]
            asked[i] = (question, recall.values_answer(values), kind)
    while ends:
        taken = [ends.pop() for _ in range(min(len(ends), rng.randint(1, 4)))]
        question = recall.queries_question([key for key, _ in taken])
        asked.append((question, recall.queries_answer(taken), 2))
    rng.shuffle(asked)
    return [recall.statement(*pair) for pair in pairs], asked


def make_sequence(rng: random.Random, num_tokens: int) -> tuple[list[str], list[int], list[int]]:
    """Tokens, indices of sentence starts, and kinds; tokens and kinds ``num_tokens`` long."""
    told = int(rng.uniform(0.45, 0.75) * num_tokens)
    num_stated = int(rng.uniform(0.2, 0.9) * told)
    statements, asked = make_statements(rng, num_stated)
    num_filler = told - sum(map(len, statements))
    filler = needle.filler(rng, num_filler) if num_filler >= needle.FILLER_TOKENS[0] else []
    sentences = recall.scattered(rng, statements, filler)
    tokens, starts, kinds = [needle.BOS], [], [0]
    for sentence in sentences:
        starts.append(len(tokens))
        tokens += sentence
        kinds += [0] * len(sentence)
    while len(tokens) < num_tokens:
        starts.append(len(tokens))
        if asked and rng.random() < 0.85:
            question, answer, kind = asked.pop()
            tokens += question + answer
            kinds += [0] * len(question) + [1 + kind] * len(answer)
        else:
            sentence = needle.filler(rng, rng.randint(*needle.FILLER_TOKENS))[0]
            tokens += sentence
            kinds += [0] * len(sentence)
    return tokens[:num_tokens], starts, kinds[:num_tokens]


def gapped_positions(rng: random.Random, num_tokens: int, starts: list[int]) -> list[int]:
    """Positions that grow by one within a sentence and jump between sentences. [num_tokens]."""
    num_skipped = 0
    if rng.random() < 0.6:
        num_skipped = int(rng.random() * max(0, MAX_POSITION - num_tokens))
    jumps = [0] * num_tokens
    for _ in range(min(num_skipped, 12)):  # a dozen jumps, of very different sizes
        start = rng.choice(starts)
        if start < num_tokens:
            jumps[start] += int(2 * rng.random() * num_skipped / 12)
    positions, position = [], -1
    for jump in jumps:
        position += 1 + jump
        positions.append(position)
    return positions


def make_batch(rng: random.Random, num_tokens: int) -> Batch:
    """About ``NUM_BATCH_TOKENS`` tokens in sequences of ``num_tokens``."""
    ids, positions, kinds = [], [], []
    for _ in range(max(1, NUM_BATCH_TOKENS // num_tokens)):
        tokens, starts, of_tokens = make_sequence(rng, num_tokens)
        ids.append([TOKEN_IDS[token] for token in tokens])
        positions.append(gapped_positions(rng, num_tokens, starts))
        kinds.append(of_tokens)
    return Batch(torch.tensor(ids), torch.tensor(positions), torch.tensor(kinds))


def losses(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, Tensor, list[float]]:
    """Answer loss, loss on the rest (nats per token), share of answer tokens right per kind."""
    with torch.autocast("cpu", torch.bfloat16):
        # An explicit mask: without one transformers reads a position jump as a new sequence.
        hidden = model.model(
            input_ids=batch.ids[:, :-1],
            position_ids=batch.positions[:, :-1],
            attention_mask=torch.ones_like(batch.ids[:, :-1]),
            use_cache=False,
        ).last_hidden_state
        logits = model.lm_head(hidden)
    targets, kinds = batch.ids[:, 1:].flatten(), batch.kinds[:, 1:].flatten()
    logits = logits.float().flatten(0, 1)
    loss = F.cross_entropy(logits, targets, reduction="none")
    is_right = (logits.argmax(-1) == targets).float()
    rights = [is_right[kinds == 1 + i].mean().item() for i in range(len(KINDS))]
    return loss[kinds > 0].mean(), loss[kinds == 0].mean(), rights


def learning_rate(step: int) -> float:
    """Linear warm-up, constant, cosine decay."""
    if step < NUM_WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / NUM_WARMUP_STEPS
    progress = max(0.0, (step / NUM_STEPS - DECAY_FROM) / (1 - DECAY_FROM))
    height = PEAK_LEARNING_RATE - FINAL_LEARNING_RATE
    return FINAL_LEARNING_RATE + height * (0.5 + 0.5 * math.cos(math.pi * progress))


def draw_length(rng: random.Random, step: int) -> int:
    """Tokens per sequence at this step of the curriculum."""
    return rng.choice(next(lengths for until, lengths in CURRICULUM if step < until * NUM_STEPS))


def train(seed: int, checkpoint: Path) -> tuple[LlamaForCausalLM, float]:
    """The trained model, float32, and the seconds it took in all."""
    model = structured_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    first, seconds_before, recent = 0, 0.0, [0.0] * len(KINDS)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds_before = state["step"], state["seconds"]
    started = time.monotonic()
    for step in range(first, NUM_STEPS):
        rng = random.Random(f"recall {seed} {step}")  # so that a run that goes on draws the same
        num_tokens = draw_length(rng, step)
        answer_loss, other_loss, rights = losses(model, make_batch(rng, num_tokens))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.zero_grad(set_to_none=True)
        (answer_loss + OTHER_LOSS_WEIGHT * other_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for i, right in enumerate(rights):
            if not math.isnan(right):
                recent[i] = 0.9 * recent[i] + 0.1 * right
        seconds = seconds_before + time.monotonic() - started
        if step % 20 == 0 or step == NUM_STEPS - 1:
            shares = " ".join(f"{k} {100 * r:.1f}" for k, r in zip(KINDS, recent, strict=True))
            print(
                f"step {step}/{NUM_STEPS} length {num_tokens} answer {answer_loss.item():.3f} "
                f"rest {other_loss.item():.3f} right% {shares} {seconds / 60:.1f} min",
                flush=True,
            )
        if (step + 1) % CHECKPOINT_STEPS == 0:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "seconds": seconds,
            }
            partial = checkpoint.with_suffix(".part")
            torch.save(state, partial)
            partial.replace(checkpoint)
    return model, seconds_before + time.monotonic() - started


def save(model: LlamaForCausalLM, out: Path, seed: int, seconds: float) -> None:
    """Weights in bfloat16, configs, tokenizer as vLLM loads them, and where they come from."""
    model = model.to(torch.bfloat16).eval()
    model.generation_config.do_sample = False
    model.save_pretrained(out)
    needle.build_tokenizer().save_pretrained(out)
    made = {
        "command": " ".join(["models/recall/train.py", *sys.argv[1:]]),
        "seed": seed,
        "steps": NUM_STEPS,
        "minutes": round(seconds / 60, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": "generated by vllm_spindle/evaluation/recall.py, split train",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": platform.machine(),
        "threads": 1,
    }
    (out / "provenance.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, default=Path("build/recall.pt"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # more threads gain little at this size, and results repeat exactly
    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    model, seconds = train(args.seed, args.checkpoint)
    args.out.mkdir(parents=True, exist_ok=True)
    save(model, args.out, args.seed, seconds)


if __name__ == "__main__":
    main()
