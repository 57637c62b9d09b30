"""Blocks that one request's prompt holds after prefill, read off a real server."""

import time
from collections import Counter

from vllm_spindle.serving.metrics import Metrics
from vllm_spindle.serving.server import VllmServer

NUM_READINGS = 8
MIN_AGREEING = 6
# A busy server may deliver a whole stream at once, when there is nothing left to read.
NUM_ATTEMPTS = 8
# Blocks of output that hold the request open: seconds, even at a millisecond or two a token.
HOLD_BLOCKS = 24
GENERATED = "vllm:generation_tokens_total"


def measure_held_blocks(
    server: VllmServer, prompt: str | list[int], *, block_size: int, num_groups: int, **body: object
) -> int:
    """Send one request to an idle server and read ``/metrics`` while it decodes.

    The answer is held open by its length and a stream; a reading gives the blocks in use and
    the tokens generated of the same engine step, so the blocks of generated tokens are known
    and taken off. Six of eight readings must agree.

    Args:
        server: with no other request in it.
        prompt: text or token ids.
        block_size: tokens per block.
        num_groups: KV-cache groups; each takes blocks for generated tokens.
        body: more fields of the request, ``vllm_xargs`` for instance.

    Returns:
        Blocks over all groups.

    Raises:
        RuntimeError: if the readings do not settle on one number.
    """
    readings: list[int] = []
    for _ in range(NUM_ATTEMPTS):
        wait_until_idle(server)
        readings = _read(server, prompt, block_size, num_groups, body)
        if readings:
            held, count = Counter(readings).most_common(1)[0]
            # A scrape may fall between the two numbers of a step; most do not.
            if count >= MIN_AGREEING:
                return held
    raise RuntimeError(f"the blocks that one request holds did not settle: {readings}")


def wait_until_idle(server: VllmServer, seconds: float = 60) -> None:
    """Return once no block is in use.

    Raises:
        RuntimeError: if some still are after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while server.metrics().used_blocks:
        if time.monotonic() > deadline:
            raise RuntimeError("the server is not idle: blocks are still in use")
        time.sleep(0.1)


def _read(
    server: VllmServer,
    prompt: str | list[int],
    block_size: int,
    num_groups: int,
    body: dict[str, object],
) -> list[int]:
    import httpx

    before = server.metrics()
    request = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": HOLD_BLOCKS * block_size,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    readings: list[int] = []
    with httpx.stream(
        "POST", server.url + "/v1/completions", json=request | body, timeout=300
    ) as r:
        for line in r.iter_lines():
            # Read to the end: after an abort the gauge of blocks may stay at its last value.
            if len(readings) == NUM_READINGS or not line.startswith("data: {"):
                continue
            prompt_len = _prompt_len(line)
            now = server.metrics()
            num_generated = round(now.total(GENERATED) - _generated(before))
            # At the first token the prompt is still whole: it is reduced by the next step.
            if num_generated >= 2 and now.used_blocks > 0:
                # The newest token has no place in the cache before the step after it.
                in_cache = prompt_len + num_generated - 1
                grown = -(-in_cache // block_size) - -(-prompt_len // block_size)
                readings.append(now.used_blocks - num_groups * grown)
    return readings


def _generated(metrics: Metrics) -> float:
    return metrics.total(GENERATED)


def _prompt_len(line: str) -> int:
    import json

    return json.loads(line.removeprefix("data: "))["usage"]["prompt_tokens"]
