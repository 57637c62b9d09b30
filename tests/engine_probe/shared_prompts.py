"""Prompts that begin alike, in random order, and a look at every block that will be written."""

import random
from dataclasses import replace
from typing import Any

import tiny
from engine_probe.engines import Ask

NUM_PREFIXES = 5
# Short prompts stay whole, ratios differ, and some ask for all of their cache.
RATIOS = (None, None, 0.5, 0.25, 1.0)


def requests(num_requests: int, *, is_protected: bool = False) -> list[Ask]:
    """Five prefixes of 300 to 900 tokens, each with an end of its own; asked to be kept, or not."""
    chooser = random.Random(0)
    prefixes = [
        tiny.prompts(1, [300 + 150 * i], seed=100 + i)[0]["prompt_token_ids"]
        for i in range(NUM_PREFIXES)
    ]
    asks = []
    for i in range(num_requests):
        (own,) = tiny.prompts(1, [chooser.choice((20, 100, 250))], seed=i)
        prefix = chooser.choice(prefixes)
        ask = Ask(prefix + own["prompt_token_ids"], chooser.randint(2, 40), chooser.choice(RATIOS))
        asks.append(replace(ask, protected=len(prefix)) if is_protected else ask)
    return asks


def answered(running: Any, asks: list[Any], *, aborts: bool) -> tuple[dict[int, Any], int]:
    """Arrivals, steps and aborts in a random order; tokens of those that ended, cached tokens."""
    chooser, waiting, found, cached = random.Random(1), list(range(len(asks))), {}, 0
    inside: set[int] = set()
    while waiting or inside:
        for _ in range(chooser.randint(0, 4)):
            if waiting:
                inside.add(i := waiting.pop(0))
                running.add(str(i), asks[i])
        if aborts and inside and chooser.random() < 0.1:
            inside.discard(i := chooser.choice(sorted(inside)))
            running.engine.abort_request([str(i)])
        for output in running.step():
            if output.finished and int(output.request_id) in inside:
                inside.discard(int(output.request_id))
                found[int(output.request_id)] = list(output.outputs[0].token_ids)
                cached += output.num_cached_tokens or 0
    running.step()  # Let the worker hear of the last ones.
    return found, cached


class Checker:
    """On each reduction: no block that will be written has a hash or a second owner."""

    def __init__(self, running: Any) -> None:
        self.num_checked, self.problems = 0, 0
        self._pool = running.scheduler.kv_cache_manager.block_pool
        worker = running.core.model_executor.driver_worker.worker
        self._reducer = worker._reduction.reducer
        self._stock = self._reducer.reduce
        self._reducer.reduce = self._reduce

    def skip_reductions(self) -> None:
        """From now on look only, and leave every block as it is."""
        self._stock = lambda *reduction: None

    def _reduce(self, end: Any, first: int, stop: int, block_ids: Any) -> None:
        for band, plan in enumerate(end.plans):
            if plan.is_reduced:
                ids = block_ids(band, end.request_id)[plan.first_block : plan.tail_block]
                blocks = [self._pool.blocks[i] for i in ids.tolist()]
                self.num_checked += len(blocks)
                self.problems += sum(b.block_hash is not None or b.ref_cnt != 1 for b in blocks)
        self._stock(end, first, stop, block_ids)
