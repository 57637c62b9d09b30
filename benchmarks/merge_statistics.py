"""On which key and value statistics merging earns its bytes: cover sizes, and evict against merge.

    python benchmarks/merge_statistics.py --out benchmarks/results/merge_statistics.json

Offline, no vLLM. The models are controls, not products: the bundled retrieval model; random
weights; and a small text model, trained for some minutes on the sources of Python's standard
library and so under-trained. Prompts are each model's own kind of text, random tokens, or twelve
tokens over and over. Ratios are true bytes. A text model kept with --text-model is trained once.
"""

import argparse
import json
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NEEDLE = "models/needle"
VOCAB_SIZE = 2048
TRAIN_LEN = 1024
BATCH = 2
NUM_PROMPTS = 4
NEW_TOKENS = 8
SEED = 11


@dataclass
class Case:
    """A model and its prompts."""

    name: str
    model: str
    prompts: list[list[int]]


def text_model(folder: Path, seconds: float) -> dict[str, float]:
    """Train the text model, and write it with its tokenizer's ids of held-out files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    random.Random(SEED).shuffle(texts)
    held_out, texts = texts[:20], texts[20:]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = torch.tensor([token for text in texts for token in tokenizer.encode(text).ids])
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(_config(LlamaConfig))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    started, num_steps, losses = time.perf_counter(), 0, [0.0]
    while (left := 1 - (time.perf_counter() - started) / seconds) > 0:
        starts = torch.randint(len(ids) - TRAIN_LEN, (BATCH,)).tolist()
        batch = torch.stack([ids[start : start + TRAIN_LEN] for start in starts])
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (num_steps + 1) / 30, 4 * left)
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        num_steps += 1
    model.save_pretrained(folder)
    prompts = [tokenizer.encode(text).ids[:TRAIN_LEN] for text in held_out]
    prompts = [prompt for prompt in prompts if len(prompt) == TRAIN_LEN][:NUM_PROMPTS]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    report = {
        "train_seconds": time.perf_counter() - started,
        "train_steps": num_steps,
        "train_tokens": num_steps * BATCH * TRAIN_LEN,
        "last_loss": sum(losses[-20:]) / len(losses[-20:]),
    }
    (folder / "training.json").write_text(json.dumps(report))
    return report


def _config(config_class: Any) -> Any:
    return config_class(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rope_theta=500_000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


def random_model(folder: Path) -> str:
    """The text model's shape, as initialised."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    LlamaForCausalLM(_config(LlamaConfig)).save_pretrained(folder)
    return str(folder)


def cases(folder: Path, text_folder: Path) -> Iterator[Case]:
    """All models with all their prompts."""
    from vllm_spindle.calibration.prompts import load_tokenizer, needle_prompts

    generator = torch.Generator().manual_seed(SEED)

    def draw(num_words: int, vocab_size: int) -> list[list[int]]:
        words = torch.randperm(vocab_size, generator=generator)[:num_words]
        return [
            words[torch.randint(num_words, (TRAIN_LEN,), generator=generator)].tolist()
            for _ in range(NUM_PROMPTS)
        ]

    text = json.loads((text_folder / "prompts.json").read_text())
    weights = random_model(folder / "random")
    needle = needle_prompts(load_tokenizer(NEEDLE), NUM_PROMPTS, TRAIN_LEN)
    yield Case("needle model, its questions", NEEDLE, needle)
    yield Case("text model, held-out source", str(text_folder), text)
    yield Case("text model, 12 tokens", str(text_folder), draw(12, VOCAB_SIZE))
    yield Case("random weights, source text", weights, text)
    yield Case("random weights, random tokens", weights, draw(VOCAB_SIZE, VOCAB_SIZE))
    yield Case("random weights, 12 tokens", weights, draw(12, VOCAB_SIZE))


def measure(case: Case, keep_ratio: float) -> dict[str, Any]:
    """Cover sizes, each band alone, all bands together: as ``vllm-spindle calibrate`` does."""
    from vllm_spindle.commands.calibrate import calibrate
    from vllm_spindle.commands.geometry import read_geometry
    from vllm_spindle.config import SpindleConfig
    from vllm_spindle.policy import SpindlePolicy

    geometry = read_geometry(case.model)
    config = SpindleConfig(keep_ratio=keep_ratio, num_bands=geometry.num_layers)
    policy = SpindlePolicy(config, geometry.num_layers, 32, geometry.num_queries_per_kv)
    _, report = calibrate(case.model, "float32", case.prompts, [policy], NEW_TOKENS)
    return report


def print_case(name: str, report: dict[str, Any]) -> None:
    """One table a case: a row a layer, and the whole plans."""
    print(f"\n{name}\n")
    print("| layer | keys | values | evict | merge | both |\n|---|---|---|---|---|---|")
    for cover, band in zip(report["covers"], report["bands"], strict=True):
        shares = [sum(cover[side]) / len(cover[side]) for side in ("keys", "values")]
        errors = [band["methods"][name]["answer_error"] for name in ("evict", "merge", "both")]
        figures = [f"{share:.2f}" for share in shares] + [f"{error:.3f}" for error in errors]
        print(f"| {cover['layer']} | " + " | ".join(figures) + " |")
    for whole in report["wholes"]:
        methods = " ".join(whole["band_methods"])
        print(f"{methods}: KL {whole['divergence']:.2e}, same token {whole['agreement']:.2f}")
    sys.stdout.flush()


def main() -> int:
    """Train, measure, print tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep-ratio", type=float, default=0.2)
    parser.add_argument("--train-seconds", type=float, default=240)
    parser.add_argument("--text-model", type=Path, help="folder to keep the text model in")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from vllm_spindle.bench.provenance import provenance

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text_folder = args.text_model or folder / "text"
        if not (text_folder / "training.json").exists():
            text_model(text_folder, args.train_seconds)
        found = {"keep_ratio": args.keep_ratio, "prompt_len": TRAIN_LEN, "made": provenance()}
        found["text_model"] = json.loads((text_folder / "training.json").read_text())
        print(found["text_model"])
        found["cases"] = {}
        for case in cases(folder, text_folder):
            report = measure(case, args.keep_ratio)
            print_case(case.name, report)
            names = ("covers", "bands", "wholes")
            found["cases"][case.name] = {name: report[name] for name in names}
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
