"""kvpress's side of ``kvpress_side.py``: runs in its own environment, JSON in, JSON out.

    .venv-kvpress/bin/python benchmarks/kvpress_child.py < job.json > answers.json

Imports nothing of ours: it gets token ids and gives token ids back.
"""

import json
import sys
from importlib.metadata import version
from typing import Any

import torch
from kvpress import (
    ExpectedAttentionPress,
    MergingPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
)
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar


def make_press(method: str, ratio: float, dials: dict[str, int]) -> Any:
    """A press by the name of our method, and the same dials."""
    gone = 1 - ratio
    if method == "streaming_llm":
        return StreamingLLMPress(compression_ratio=gone, n_sink=4)
    if method == "expected_attention":
        return ExpectedAttentionPress(compression_ratio=gone)
    window = {"window_size": dials["window"], "kernel_size": dials["kernel"]}
    if method == "pyramidkv":
        return PyramidKVPress(compression_ratio=gone, beta=20, **window)
    snapkv = SnapKVPress(compression_ratio=gone, **window)
    return MergingPress(press=snapkv) if method == "merging" else snapkv


def drop_last(layer: Any, last_keys: torch.Tensor) -> None:
    """Take the prompt's last token off a layer, where every head has kept it.

    Presses leave rows in order of score, so it is found by its key. last_keys: [1, heads, 1, size].
    """
    is_last = (layer.keys == last_keys).all(-1)  # [1, heads, rows]
    if not bool((is_last.sum(-1) == 1).all()):
        return
    shape = (*is_last.shape[:2], is_last.shape[2] - 1, layer.keys.shape[-1])
    layer.keys = layer.keys[~is_last].reshape(shape)
    layer.values = layer.values[~is_last].reshape(shape)


@torch.inference_mode()
def answer(
    model: Any, press: Any, sample: dict[str, list[int]], most: int, stop_ids: set[int]
) -> tuple[list[int], float]:
    """Greedy token ids behind the follow-up, and the share of the prompt's rows left in the cache.

    One token at a time: layers may be of different lengths, and one query needs no mask.
    """
    prompt, unread = sample["prompt"], list(sample["followup"])
    cache = DynamicCache()
    with press(model):
        model.model(input_ids=torch.tensor([prompt]), past_key_values=cache)
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    position, said = len(prompt), []
    if not unread:  # the question is in the prompt: its last token is read again
        whole = DynamicCache()
        model.model(input_ids=torch.tensor([prompt]), past_key_values=whole)
        for layer, before in zip(cache.layers, whole.layers, strict=True):
            drop_last(layer, before.keys[:, :, -1:])
        position, unread = position - 1, [prompt[-1]]
    while len(said) < most:
        while unread:
            ids, place = torch.tensor([[unread.pop(0)]]), torch.tensor([[position]])
            logits = model(input_ids=ids, past_key_values=cache, position_ids=place).logits
            position += 1
        token = int(logits[0, -1].argmax())
        if token in stop_ids:
            break
        said.append(token)
        unread = [token]
    return said, sum(lengths) / len(lengths) / len(prompt)


def main() -> int:
    """Answer every sample under every press."""
    job = json.load(sys.stdin)
    torch.set_num_threads(1)
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    stop_ids, runs = set(job["stop_ids"]), []
    for run in job["runs"]:
        press = make_press(run["method"], run["ratio"], run["dials"])
        said, kept = [], []
        for sample in job["samples"]:
            tokens, share = answer(model, press, sample, job["most"], stop_ids)
            said.append(tokens)
            kept.append(share)
        runs.append({**run, "said": said, "kept": sum(kept) / len(kept)})
        print(f"kvpress: {run['method']} {run['ratio']:g}", file=sys.stderr, flush=True)
    versions = {name: version(name) for name in ("kvpress", "torch", "transformers")}
    json.dump({"runs": runs, "versions": versions}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
