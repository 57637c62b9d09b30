"""Many questions at once to one server, and what the server said of itself meanwhile."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx

from vllm_spindle.serving.metrics import Metrics
from vllm_spindle.serving.server import VllmServer

POLL_SECONDS = 0.1
EOS = "</s>"


@dataclass(frozen=True)
class LoadResult:
    """What came back.

    Attributes:
        texts: answers up to the end-of-sequence token, in the order of the questions.
        seconds: from the first request sent to the last answer.
        peak_running: most requests that the server said were running, polled.
        peak_used_ratio: fullest that the block pool was seen, [0, 1].
        preemptions: requests thrown out of memory and computed again.
        output_tokens: generated.
    """

    texts: list[str]
    seconds: float
    peak_running: int
    peak_used_ratio: float
    preemptions: int
    output_tokens: int


def ask_all(
    server: VllmServer,
    prompts: Sequence[str],
    *,
    output_len: int,
    on_answer: Callable[[int], None] = lambda done: None,
    **body: object,
) -> LoadResult:
    """Send every prompt at once and wait for all.

    Every request generates ``output_len`` tokens, as a real chat would go on, so that memory
    fills; its answer is what stands before the end-of-sequence token.

    Args:
        server: to ask.
        prompts: texts.
        output_len: tokens to generate for each.
        on_answer: called with the number of answers so far.
        body: more fields of each request, ``vllm_xargs`` for instance.
    """
    return asyncio.run(_ask_all(server, prompts, output_len, on_answer, body))


async def _ask_all(
    server: VllmServer,
    prompts: Sequence[str],
    output_len: int,
    on_answer: Callable[[int], None],
    body: dict[str, object],
) -> LoadResult:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits) as client:
        before = await _read(client)
        readings: list[Metrics] = []
        watch = asyncio.create_task(_watch(client, readings))
        num_done = 0

        async def ask(prompt: str) -> str:
            nonlocal num_done
            request = {
                "model": server.model,
                "prompt": prompt,
                "max_tokens": output_len,
                "temperature": 0,
                "ignore_eos": True,
                "skip_special_tokens": False,
            }
            reply = await client.post("/v1/completions", json=request | body)
            reply.raise_for_status()
            num_done += 1
            on_answer(num_done)
            return reply.json()["choices"][0]["text"].split(EOS)[0]

        start = time.monotonic()
        try:
            texts = list(await asyncio.gather(*map(ask, prompts)))
        finally:
            watch.cancel()
        seconds = time.monotonic() - start
        after = await _read(client)
    return LoadResult(
        texts=texts,
        seconds=seconds,
        peak_running=max(int(m.total("vllm:num_requests_running")) for m in [after, *readings]),
        peak_used_ratio=max(m.total("vllm:kv_cache_usage_perc") for m in [after, *readings]),
        preemptions=_delta(before, after, "vllm:num_preemptions_total"),
        output_tokens=_delta(before, after, "vllm:generation_tokens_total"),
    )


async def _watch(client: httpx.AsyncClient, readings: list[Metrics]) -> None:
    while True:
        readings.append(await _read(client))
        await asyncio.sleep(POLL_SECONDS)


async def _read(client: httpx.AsyncClient) -> Metrics:
    return Metrics.parse((await client.get("/metrics")).raise_for_status().text)


def _delta(before: Metrics, after: Metrics, name: str) -> int:
    return round(after.total(name) - before.total(name))
