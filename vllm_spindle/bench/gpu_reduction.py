"""``bench gpu``'s reduction: scoring, ranking and compaction of layers, by our kernels.

Run as ``python -m vllm_spindle.bench.gpu_reduction`` with the options as JSON on standard input.
A prompt lies in scattered blocks of the layers' caches, and is ranked in as many layers at once as
the engine would. Seconds are one layer's part. The device's are of several reductions in a row,
launched while the device has other work, as in service, where they wait behind a prefill. Errors
are against the torch functions, on the same device.

Shapes: K kv heads, G query heads per kv head, Q observed queries, T tokens, D head size.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from vllm_spindle.choice_rule import choice_rule
from vllm_spindle.config import SpindleConfig
from vllm_spindle.core.choice import (
    Maps,
    attention_maps,
    choose_by_maps,
    layers_at_once,
    stack_maps,
)
from vllm_spindle.core.eviction import gather_kept
from vllm_spindle.core.observers import observed_positions
from vllm_spindle.core.scoring import Questions, answer
from vllm_spindle.kernels.device_compaction import compact
from vllm_spindle.kernels.device_scoring import PagedKeys

BUSY_CYCLES = 200_000_000  # about a tenth of a second: longer than the launches take
IN_A_ROW = 4


class LayersReduction:
    """Caches of as many layers as are ranked in one go, and the parts of a prompt's reduction."""

    def __init__(self, options: dict[str, Any], num_tokens: int) -> None:
        """Args: options: as ``run`` has them; num_tokens: T, cut to whole blocks."""
        device, n, d = options["device"], options["block_size"], options["head_size"]
        heads, group = options["num_kv_heads"], options["group"]
        dtype = getattr(torch, options.get("dtype", "bfloat16"))
        config = SpindleConfig(window=options.get("window", 32))
        num_blocks = num_tokens // n
        self.num_tokens = num_blocks * n
        self.num_layers = min(options["num_layers"], layers_at_once(heads * group, self.num_tokens))
        self.scale = d**-0.5
        self.rule = choice_rule(config)
        self.blocks = torch.randperm(num_blocks, device=device) + 1
        self.positions = torch.from_numpy(
            observed_positions(
                self.num_tokens,
                window=config.window,
                observers=config.num_observers,
                first=self.num_tokens // 2,
            )
        )
        num_queries = len(self.positions)
        self.questions = Questions(
            range(num_queries - config.window, num_queries), num_queries - 1, from_afar=True
        )
        self.device_positions = self.positions.to(device)
        cache = (num_blocks + 1, heads, n, 2 * d)
        queries = (len(self.positions), heads, group, d)
        layers = range(self.num_layers)
        self.caches = [torch.randn(cache, device=device).to(dtype) for _ in layers]
        self.keys = [PagedKeys(each, self.blocks, self.num_tokens) for each in self.caches]
        self.queries = [
            torch.randn(queries, device=device).to(dtype).permute(1, 2, 0, 3) for _ in layers
        ]
        tail = num_blocks - -(-config.window // n)
        num_kept = max(1, int(tail * options["keep_ratio"]))
        self.num_context, self.num_kept = tail * n, num_kept * n
        self.region = self.blocks[tail - num_kept : tail]

    def attend(self) -> list[tuple[Tensor, ...]]:
        """Everything that the default rule asks of each layer."""
        return [
            keys.answer(queries, self.device_positions, self.scale, self.questions)
            for keys, queries in zip(self.keys, self.queries, strict=True)
        ]

    def attend_by_torch(self) -> list[tuple[Tensor, ...]]:
        """The same."""
        asked = []
        for cache, queries in zip(self.caches, self.queries, strict=True):
            keys = self._tokens(cache)[..., : cache.shape[-1] // 2].contiguous()
            asked.append(answer(queries, keys, self.positions, self.scale, self.questions))
        return asked

    def rank(self) -> tuple[Tensor, ...]:
        """The kept positions of each layer, ascending, scoring included. [K, N] each."""
        return self._chosen(self._maps()).chunk(self.num_layers)

    def is_ranked(self) -> bool:
        """Whether the CPU keeps the same of the same scores."""
        maps = self._maps()
        return torch.equal(
            self._chosen(maps).cpu(), self._chosen(tuple(each.cpu() for each in maps))
        )

    def _maps(self) -> Maps:
        return stack_maps(
            [
                attention_maps(
                    self.rule,
                    queries,
                    keys,
                    self.device_positions,
                    scale=self.scale,
                    num_context=self.num_context,
                )
                for keys, queries in zip(self.keys, self.queries, strict=True)
            ]
        )

    def _chosen(self, maps: Maps) -> Tensor:
        return choose_by_maps(self.rule, maps, num_kept=self.num_kept)

    def move(self, kept: Sequence[Tensor]) -> None:
        """The kept tokens into the region."""
        for cache, own in zip(self.caches, kept, strict=True):
            heads, n = cache.shape[1:3]
            positions = own.reshape(heads, len(self.region), n).transpose(0, 1)
            compact(cache, self.blocks, positions, self.region)

    def is_moved(self, kept: Sequence[Tensor]) -> bool:
        """Whether ``move`` does what reading, gathering and writing would."""
        layers = list(zip(self.caches, kept, strict=True))
        expected = [gather_kept(self._tokens(cache), own) for cache, own in layers]
        self.move(kept)
        moved = [self._tokens(cache, self.region) for cache in self.caches]
        return all(map(torch.equal, moved, expected))

    def _tokens(self, cache: Tensor, blocks: Tensor | None = None) -> Tensor:
        """Keys and values of the given blocks, of the prompt. [K, T, 2 * D]."""
        found = cache[self.blocks if blocks is None else blocks]
        return found.transpose(0, 1).flatten(1, 2)


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
    """One context: seconds of the parts, for one layer of a batch, and whether they are right."""
    device, repeats = options["device"], options["repeats"]
    layers = LayersReduction(options, num_tokens)
    errors = [
        float((ours - theirs).abs().max() / theirs.abs().max())
        for maps in zip(layers.attend(), layers.attend_by_torch(), strict=True)
        for ours, theirs in zip(*maps, strict=True)
    ]
    kept = layers.rank()
    result = {
        "context": num_tokens,
        "layers_at_once": layers.num_layers,
        "score_error": max(errors),
        "is_ranked": layers.is_ranked(),
        "is_moved": layers.is_moved(kept),
    }
    parts: dict[str, Callable[[], Any]] = {
        "score": layers.attend,
        "score_and_rank": layers.rank,
        "move": lambda: layers.move(kept),
        "layer": lambda: layers.move(layers.rank()),
    }
    if device != "cpu":
        parts["torch_score"] = layers.attend_by_torch
    for name, call in parts.items():
        on_device, on_host = seconds_in_a_row(call, repeats, device)
        result |= {
            f"{name}_seconds": on_device / layers.num_layers,
            f"{name}_host_seconds": on_host / layers.num_layers,
        }
    return result


def run(options: dict[str, Any]) -> None:
    """One result per shape and context, printed with those before it as they come.

    Args:
        options: ``device``, ``contexts``, ``num_layers``, ``num_kv_heads``, ``group``,
            ``head_size``, ``block_size``, ``keep_ratio``, ``repeats``, ``seed``; ``dtype`` and
            ``window`` if other than usual; ``shapes``, options that differ from one result to the
            next.
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
