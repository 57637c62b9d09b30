"""What a user of one `vllm serve` with covipal sees, over real HTTP.

Run with: pytest tests/serve/test_covipal_server.py
"""

import base64
import concurrent.futures
import io
import json
import random
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from vllm_spindle.serving.metrics import Metrics
from vllm_spindle.serving.server import VllmServer

NUM_PATCHES = 16
FLAGS = (
    "--dtype=float32",
    "--block-size=32",
    "--kv-cache-memory-bytes=16777216",
    "--max-model-len=1024",
    "--max-num-seqs=32",
    "--enforce-eager",
    '--limit-mm-per-prompt={"image": 2}',
    "--enable-scale-out",
)
COVIPAL = {"selector": "cdpruner", "keep_ratio": 0.5}
NUM_MIXED = 200


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """A random LLaVA of 16 visual tokens an image, half of them kept unless a request says so.

    Its chat template is the server's, not the model's.
    """
    import tiny_lvlm

    folder = tiny_lvlm.write("llava", tmp_path_factory.mktemp("llava"))
    log = tmp_path_factory.mktemp("server") / "log"
    flags = [*FLAGS, "--additional-config", json.dumps({"covipal": COVIPAL})]
    flags.append(f"--chat-template={tiny_lvlm.other_template('llava')}")
    with VllmServer(str(folder), flags, log) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: VllmServer) -> openai.OpenAI:
    """The official client."""
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def message(words: str, *seeds: int) -> dict[str, Any]:
    """A user's message with a picture per seed."""
    import tiny_lvlm

    parts: list[dict[str, Any]] = []
    for seed in seeds:
        buffer = io.BytesIO()
        tiny_lvlm.picture(64, 64, seed).save(buffer, format="PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": [*parts, {"type": "text", "text": words}]}


def ask(
    client: openai.OpenAI,
    messages: list[dict[str, Any]],
    keep_ratio: object = None,
    *,
    streams: bool = False,
) -> tuple[int, str]:
    """Prompt tokens and the answer, in one piece or put together from a stream."""
    extra: dict[str, Any] = {"ignore_eos": True}
    if keep_ratio is not None:
        extra["vllm_xargs"] = {"covipal_keep_ratio": keep_ratio}
    asked = {
        "model": client.models.list().data[0].id,
        "messages": messages,
        "max_tokens": 6,
        "temperature": 0,
        "extra_body": extra,
    }
    if streams:
        *chunks, last = client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
        # The role, then the words: vLLM sends as one chunk what it has not sent yet, so that a
        # server ahead of this client may put the whole answer into one.
        assert len(chunks) >= 2
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        return last.usage.prompt_tokens, "".join(pieces)
    answer = client.chat.completions.create(**asked)
    return answer.usage.prompt_tokens, answer.choices[0].message.content


def visual_tokens(metrics: Metrics) -> tuple[float, float]:
    """Before pruning, and kept."""
    names = ("visual_tokens", "visual_tokens_kept")
    return tuple(metrics.total(f"vllm:covipal_{name}_total") for name in names)


def wait_until_idle(server: VllmServer) -> Metrics:
    """Once no request runs and no block is used."""
    deadline = time.monotonic() + 60
    while True:
        metrics = server.metrics()
        if metrics.total("vllm:num_requests_running") == 0 and metrics.used_blocks == 0:
            return metrics
        assert time.monotonic() < deadline, "blocks are still in use"
        time.sleep(0.1)


def test_prompt_tokens_follow_the_ratio(server: VllmServer, client: openai.OpenAI) -> None:
    """Usage counts the kept tokens; /metrics count those and the unpruned ones."""
    text_only, _ = ask(client, [message("what is red ?")])
    before = visual_tokens(server.metrics())
    kept = {None: 8, 1.0: 16, 0.5: 8, 0.25: 4, 0.1: 2}
    for ratio, num_kept in kept.items():
        num_tokens, _ = ask(client, [message("what is red ?", 1)], ratio)
        assert num_tokens == text_only + num_kept
        num_tokens, _ = ask(client, [message("what is red ?", 1, 2)], ratio)
        assert num_tokens == text_only + 2 * num_kept
    after = visual_tokens(server.metrics())
    # At ratio 1.0 nothing is injected, and nothing counted.
    assert after[0] - before[0] == 4 * 3 * NUM_PATCHES
    assert after[1] - before[1] == 3 * (8 + 8 + 4 + 2)


def test_worker_numbers_arrive(server: VllmServer, client: openai.OpenAI) -> None:
    """Pruned items, encoder runs, kept embeddings and seconds, counted by the worker."""
    names = ("pruned_items", "encoder_runs", "encoder_reuses", "selection_seconds")

    def numbers() -> list[float]:
        return [server.metrics().total(f"vllm:covipal_{name}_total") for name in names]

    before = numbers()
    ask(client, [message("what is blue ?", 71)])
    ask(client, [message("left or right ?", 71)])
    wait_until_idle(server)
    items, encoded, reused, seconds = (b - a for a, b in zip(before, numbers(), strict=True))
    assert (items, encoded, reused) == (2, 1, 1)
    assert seconds > 0


def test_growing_chat_keeps_its_prefix(server: VllmServer, client: openai.OpenAI) -> None:
    """The next turn finds the picture's tokens in the prefix cache: the choice did not change."""
    first = [message("what is the color of the red circle ? " * 6, 81, 82)]
    num_tokens, answer = ask(client, first)
    before = server.metrics().total("vllm:prefix_cache_hits_total")
    turns = [*first, {"role": "assistant", "content": answer}, message("left or right ?")]
    ask(client, turns)
    hits = server.metrics().total("vllm:prefix_cache_hits_total") - before
    assert hits == num_tokens // 32 * 32 >= 32


@pytest.mark.parametrize(
    ("xargs", "said"),
    [
        ({"covipal_keep_ratio": 0}, "must be in (0, 1], got 0"),
        ({"covipal_keep_ratio": 1.5}, "must be in (0, 1], got 1.5"),
        ({"covipal_keep_ratio": "half"}, "must be a number in (0, 1], got 'half'"),
        ({"covipal_ratio": 0.5}, "did you mean 'covipal_keep_ratio'?"),
        ({"coviapl_keep_ratio": 0.5}, "did you mean 'covipal_keep_ratio'?"),
        ({"covipal_chat_template": "{{ 1 }}"}, "unknown option 'covipal_chat_template'"),
    ],
)
def test_bad_ratio_is_400(server: VllmServer, xargs: dict[str, Any], said: str) -> None:
    """With a picture and without, and the message names what is wrong."""
    for content in (message("what ?", 1), message("what ?")):
        body = {"model": server.model, "messages": [content], "vllm_xargs": xargs}
        answer = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 400
        assert said in answer.json()["error"]["message"]


def test_what_was_rendered_apart_is_served(server: VllmServer) -> None:
    """A prompt that comes as tokens and features is as long as its ratio says; another is 400."""
    for ratio, num_kept in ((0.25, 4), (1.0, 16)):
        body = {"model": server.model, "messages": [message("what is red ?", 1)], "max_tokens": 2}
        body["vllm_xargs"] = {"covipal_keep_ratio": ratio}
        chat = f"{server.url}/v1/chat/completions"
        rendered = httpx.post(f"{chat}/render", json=body, timeout=60).raise_for_status().json()
        answer = httpx.post(f"{server.url}/inference/v1/generate", json=rendered, timeout=60)
        assert answer.status_code == 200, answer.text
        usual = httpx.post(chat, json=body, timeout=60).json()
        assert answer.json()["usage"] == usual["usage"]
        assert (
            sum(p["length"] for p in rendered["features"]["mm_placeholders"]["image"]) == num_kept
        )
        rendered["sampling_params"]["extra_args"]["covipal_keep_ratio"] = 0.5
        answer = httpx.post(f"{server.url}/inference/v1/generate", json=rendered, timeout=60)
        assert answer.status_code == 400
        assert f"were processed at {ratio}" in answer.json()["error"]["message"]


def test_unreadable_picture_is_400(server: VllmServer) -> None:
    """A picture that is none."""
    url = "data:image/png;base64," + base64.b64encode(b"no picture").decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what"}]
    body = {"model": server.model, "messages": [{"role": "user", "content": content}]}
    answer = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400


def test_two_hundred_requests_leave_nothing(server: VllmServer, client: openai.OpenAI) -> None:
    """Streams, aborts and bad requests among them; good ones answer as alone; all blocks free."""
    cases = [
        (words, seeds, ratio)
        for words in ("what is red ?", "left or right ?")
        for seeds in ((1,), (2,), (1, 2))
        for ratio in (None, 1.0, 0.25)
    ]
    alone = [ask(client, [message(w, *seeds)], ratio) for w, seeds, ratio in cases]

    def one(i: int) -> None:
        words, seeds, ratio = cases[i % len(cases)]
        if i % 5 == 4:
            _abort(server, message(words, *seeds), after_chunks=random.Random(i).randint(0, 4))
        elif i % 25 == 3:
            with pytest.raises(openai.BadRequestError):
                ask(client, [message(words, *seeds)], -1)
        else:
            found = ask(client, [message(words, *seeds)], ratio, streams=i % 2 == 0)
            assert found == alone[i % len(cases)]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(NUM_MIXED)))
    wait_until_idle(server)


def _abort(server: VllmServer, content: dict[str, Any], *, after_chunks: int) -> None:
    body = {"model": server.model, "messages": [content], "stream": True, "max_tokens": 200,
            "ignore_eos": True}  # fmt: skip
    url = server.url + "/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=60) as answer:
        for i, _ in enumerate(answer.iter_lines()):
            if i >= after_chunks:
                return
