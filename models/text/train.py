"""Train the text model: one CPU thread, Python's own sources; goes on where it was killed.

    .venv/bin/python models/text/train.py --out models/text

Notable:
- Starts from ``structure.py``, as random weights do not come to use their context in this time.
- A share of the sequences holds passages twice, at random distances: what stood there before is
  worth looking up. Lengths grow from 128 to 1,152 tokens.
- Every CHECKPOINT_STEPS steps the state goes to ``build/text.pt``; the same command goes on from
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
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from structure import VOCAB_SIZE, structured_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_spindle.evaluation.source import read_files

NUM_STEPS = 1100
NUM_BATCH_TOKENS = 3456
NUM_WARMUP_STEPS = 40
PEAK_LEARNING_RATE = 2e-3
FINAL_LEARNING_RATE = 2e-5
DECAY_STEPS = 600  # the last ones: the rate falls, by a cosine
CHECKPOINT_STEPS = 50
REPEATING_SHARE = 0.5  # of the sequences
PASSAGE_TOKENS = (16, 128)
TOKENS_PER_PASSAGE = 192  # so that a third of a repeating sequence is passages said again
CURRICULUM = (  # until this step, sequence lengths in tokens to draw from
    (60, (128,)),
    (300, (256, 384)),
    (600, (384, 576, 576)),
    (NUM_STEPS, (576, 576, 1152)),
)
PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every text starts with ``BOS``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[PAD, BOS, EOS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS
    )


def make_sequence(rng: random.Random, ids: Tensor, num_tokens: int, bos: int) -> Tensor:
    """``BOS`` and a run of the text, perhaps with passages of it said again later. [num_tokens]."""
    start = rng.randrange(len(ids) - num_tokens)
    tokens = ids[start : start + num_tokens].clone()
    if rng.random() < REPEATING_SHARE:
        for _ in range(max(1, num_tokens // TOKENS_PER_PASSAGE)):
            size = min(rng.randint(*PASSAGE_TOKENS), num_tokens // 4)
            source = rng.randrange(1, num_tokens - 2 * size)
            target = rng.randrange(source + size, num_tokens - size + 1)
            tokens[target : target + size] = tokens[source : source + size].clone()
    tokens[0] = bos
    return tokens


def make_batch(rng: random.Random, ids: Tensor, num_tokens: int, bos: int) -> Tensor:
    """About ``NUM_BATCH_TOKENS`` tokens. [B, num_tokens]."""
    count = max(1, NUM_BATCH_TOKENS // num_tokens)
    return torch.stack([make_sequence(rng, ids, num_tokens, bos) for _ in range(count)])


def loss_of(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Mean loss, nats per token."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def learning_rate(step: int) -> float:
    """Linear warm-up, constant, cosine decay."""
    if step < NUM_WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / NUM_WARMUP_STEPS
    progress = max(0.0, 1 - (NUM_STEPS - step) / DECAY_STEPS)
    height = PEAK_LEARNING_RATE - FINAL_LEARNING_RATE
    return FINAL_LEARNING_RATE + height * (0.5 + 0.5 * math.cos(math.pi * progress))


def draw_length(rng: random.Random, step: int) -> int:
    """Tokens per sequence at this step of the curriculum."""
    return rng.choice(next(lengths for until, lengths in CURRICULUM if step < until))


def train(seed: int, checkpoint: Path, ids: Tensor, bos: int) -> tuple[LlamaForCausalLM, float]:
    """The trained model, float32, and the seconds it took in all."""
    model = structured_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    first, seconds_before, recent = 0, 0.0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds_before = state["step"], state["seconds"]
    started = time.monotonic()
    for step in range(first, NUM_STEPS):
        rng = random.Random(f"text {seed} {step}")  # so that a run that goes on draws the same
        num_tokens = draw_length(rng, step)
        loss = loss_of(model, make_batch(rng, ids, num_tokens, bos))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = loss.item() if not recent else 0.95 * recent + 0.05 * loss.item()
        seconds = seconds_before + time.monotonic() - started
        if step % 20 == 0 or step == NUM_STEPS - 1:
            print(
                f"step {step}/{NUM_STEPS} length {num_tokens} loss {recent:.3f} "
                f"{seconds / 60:.1f} min",
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


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    seed: int,
    seconds: float,
    num_tokens: int,
) -> None:
    """Weights in bfloat16, configs, tokenizer as vLLM loads them, and where they come from."""
    model = model.to(torch.bfloat16).eval()
    model.generation_config.do_sample = False
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    made = {
        "command": " ".join(["models/text/train.py", *sys.argv[1:]]),
        "seed": seed,
        "steps": NUM_STEPS,
        "minutes": round(seconds / 60, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": f"standard library of Python {platform.python_version()}, {num_tokens} tokens",
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
    parser.add_argument("--checkpoint", type=Path, default=Path("build/text.pt"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # more threads gain little at this size, and results repeat exactly
    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    texts = read_files(held_out=False)
    tokenizer = train_tokenizer(texts)
    ids = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
    model, seconds = train(args.seed, args.checkpoint, ids, tokenizer.bos_token_id)
    args.out.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, args.out, args.seed, seconds, len(ids))


if __name__ == "__main__":
    main()
