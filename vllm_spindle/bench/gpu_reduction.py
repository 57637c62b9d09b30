"""``bench gpu``'s reduction: scoring, ranking and compaction of one layer, by our kernels.

Run as ``python -m vllm_spindle.bench.gpu_reduction`` with the options as JSON on standard input.
A prompt lies in scattered blocks of a layer's cache; the device's seconds are of many reductions in
a row, launched while the device has other work, as in service, where they wait behind a prefill.
Errors are against the torch functions, on the same device.

Shapes: K kv heads, G query heads per kv head, Q observed queries, T tokens, D head size.
"""

import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from vllm_spindle.choice_rule import choice_rule
from vllm_spindle.config import SpindleConfig
from vllm_spindle.core.choice import rank_context
from vllm_spindle.core.eviction import gather_kept
from vllm_spindle.core.observers import observed_positions
from vllm_spindle.core.scoring import MIN_DISTANCE, TorchAttention
from vllm_spindle.kernels.device_compaction import compact
from vllm_spindle.kernels.device_scoring import PagedKeys

BUSY_CYCLES = 200_000_000  # about a tenth of a second: longer than the launches take
IN_A_ROW = 8


class LayerReduction:
    """One layer's cache and prompt, with the parts of its reduction."""

    def __init__(self, options: dict[str, Any], num_tokens: int) -> None:
        """Args: options: as ``run`` has them; num_tokens: T, cut to whole blocks."""
        device, n, d = options["device"], options["block_size"], options["head_size"]
        heads, group = options["num_kv_heads"], options["group"]
        dtype = getattr(torch, options.get("dtype", "bfloat16"))
        config = SpindleConfig(window=options.get("window", 32))
        num_blocks = num_tokens // n
        self.num_tokens = num_blocks * n
        self.scale = d**-0.5
        self.rule = choice_rule(config)
        self.cache = torch.randn(num_blocks + 1, heads, n, 2 * d, device=device).to(dtype)
        self.blocks = torch.randperm(num_blocks, device=device) + 1
        self.keys = PagedKeys(self.cache, self.blocks, self.num_tokens)
        self.positions = torch.from_numpy(
            observed_positions(
                self.num_tokens,
                window=config.window,
                observers=config.num_observers,
                first=self.num_tokens // 2,
            )
        )
        self.window = config.window
        self.device_positions = self.positions.to(device)
        queries = torch.randn(len(self.positions), heads, group, d, device=device).to(dtype)
        self.queries = queries.permute(1, 2, 0, 3)
        tail = num_blocks - -(-config.window // n)
        num_kept = max(1, int(tail * options["keep_ratio"]))
        self.counts = {
            "scale": self.scale,
            "num_context": tail * n,
            "num_kept": num_kept * n,
        }
        self.region = self.blocks[tail - num_kept : tail]

    def attend(self) -> list[Tensor]:
        """Everything that the default rule asks."""
        attention = self.keys.attend(self.queries, self.device_positions, self.scale)
        return self._asked(attention)

    def attend_by_torch(self) -> list[Tensor]:
        """The same."""
        keys = self._tokens()[..., : self.cache.shape[-1] // 2].contiguous()
        return self._asked(TorchAttention(self.queries, keys, self.positions, self.scale))

    def rank(self) -> Tensor:
        """The kept positions, ascending, scoring included. [K, N]."""
        ranked = rank_context(
            self.rule, self.queries, self.keys, self.device_positions, **self.counts
        )
        return ranked.sort(dim=-1).values

    def move(self, kept: Tensor) -> None:
        """The kept tokens into the region."""
        heads, n = self.cache.shape[1:3]
        positions = kept.reshape(heads, len(self.region), n).transpose(0, 1)
        compact(self.cache, self.blocks, positions, self.region)

    def is_moved(self, kept: Tensor) -> bool:
        """Whether ``move`` does what reading, gathering and writing would."""
        expected = gather_kept(self._tokens(), kept)
        self.move(kept)
        return torch.equal(self._tokens(self.region), expected)

    def _tokens(self, blocks: Tensor | None = None) -> Tensor:
        """Keys and values of the given blocks, of the prompt. [K, T, 2 * D]."""
        found = self.cache[self.blocks if blocks is None else blocks]
        return found.transpose(0, 1).flatten(1, 2)

    def _asked(self, attention: Any) -> list[Tensor]:
        num_queries = len(self.positions)
        return [
            attention.window(num_queries - self.window, num_queries),
            attention.most(num_queries - 1, num_queries),
            attention.most(0, num_queries, min_distance=MIN_DISTANCE),
        ]


def seconds_in_a_row(call: Callable[[], Any], repeats: int, device: str) -> tuple[float, float]:
    """Medians of a call: the device's seconds, and the host's to launch it."""
    call()  # compiles
    on_device, on_host = [], []
    for _ in range(repeats):
        if device == "cpu":
            started = time.perf_counter()
            call()
            on_device.append(time.perf_counter() - started)
            on_host.append(on_device[-1])
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(BUSY_CYCLES)
        begin.record()
        started = time.perf_counter()
        for _ in range(IN_A_ROW):
            call()
        on_host.append((time.perf_counter() - started) / IN_A_ROW)
        end.record()
        torch.cuda.synchronize()
        on_device.append(begin.elapsed_time(end) / 1e3 / IN_A_ROW)
    return median(on_device), median(on_host)


def measured(options: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """One context: seconds of the parts of one layer, and whether they are right."""
    device, repeats = options["device"], options["repeats"]
    layer = LayerReduction(options, num_tokens)
    expected = layer.attend_by_torch()
    errors = [
        float((ours - theirs).abs().max() / theirs.abs().max())
        for ours, theirs in zip(layer.attend(), expected, strict=True)
    ]
    kept = layer.rank()
    result = {"context": num_tokens, "score_error": max(errors), "is_moved": layer.is_moved(kept)}
    parts: dict[str, Callable[[], Any]] = {
        "score": layer.attend,
        "score_and_rank": layer.rank,
        "move": lambda: layer.move(kept),
        "layer": lambda: layer.move(layer.rank()),
    }
    if device != "cpu":
        parts["torch_score"] = layer.attend_by_torch
    for name, call in parts.items():
        on_device, on_host = seconds_in_a_row(call, repeats, device)
        result |= {f"{name}_seconds": on_device, f"{name}_host_seconds": on_host}
    return result


def run(options: dict[str, Any]) -> None:
    """One result per shape and context, printed with those before it as they come.

    Args:
        options: ``device``, ``contexts``, ``num_kv_heads``, ``group``, ``head_size``,
            ``block_size``, ``keep_ratio``, ``repeats``, ``seed``; ``dtype`` and ``window`` if
            other than usual; ``shapes``, options that differ from one result to the next.
    """
    torch.manual_seed(options["seed"])
    results = []
    for shape in options.get("shapes", [{}]):
        for num_tokens in options["contexts"]:
            results.append({**shape, **measured({**options, **shape}, num_tokens)})
            print("result " + json.dumps({"reductions": results}), flush=True)


def main() -> None:
    """Read the options, run."""
    run(json.load(sys.stdin))


if __name__ == "__main__":
    main()
