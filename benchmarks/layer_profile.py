"""Measure how a model's layers should share the bytes, and write it beside the model.

    python benchmarks/layer_profile.py --model models/needle

Prompts are generated: tasks that the model knows, of a seed that no evaluation uses, the question
in turn at the end of the prompt and behind the reduction. ``evaluation/answers.py`` reads the file.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_spindle.baselines.profiled import Profiled
from vllm_spindle.calibration.profile import measure_profile
from vllm_spindle.evaluation.answers import PROFILE_FILE
from vllm_spindle.evaluation.asking import dialect_for
from vllm_spindle.evaluation.protocols import make_sample
from vllm_spindle.evaluation.tasks import make_item

SEED = 20261
PROTOCOLS = ("question_last", "after_compression")


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/needle")
    parser.add_argument("--families", nargs="+", default=["single", "multikey_1"])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--prompt-len", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    dialect = dialect_for(tokenizer, model.config)
    prompts, num_new = [], 1
    for index in range(args.prompts):
        family = args.families[index // 2 % len(args.families)]
        item = make_item(
            family, dialect, prompt_tokens=args.prompt_len, seed=SEED, index=index // 2
        )
        sample = make_sample(PROTOCOLS[index % 2], dialect, item, SEED)
        followup = tokenizer(sample.followups[0], add_special_tokens=False).input_ids
        prompts.append((tokenizer(sample.prompt).input_ids, followup))
        num_new = max(num_new, len(tokenizer(sample.answers[0]).input_ids))
    with torch.inference_mode():
        profile = measure_profile(model, Profiled(), prompts, num_new=num_new)
    rows = [f'  "{ratio}": {json.dumps(shares)}' for ratio, shares in profile.items()]
    text = "{\n" + ",\n".join(rows) + "\n}\n"
    print(text, end="")
    out = args.out or Path(args.model) / PROFILE_FILE
    out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
