"""What a user of one `vllm serve` with spindle at keep 0.25 sees, over real HTTP.

Run with: pytest tests/serve/test_plugin_server.py
"""

import concurrent.futures
import json
import time
from pathlib import Path

import httpx
import openai
import pytest

from vllm_spindle.commands.geometry import read_geometry
from vllm_spindle.config import RequestOptions, SpindleConfig, with_profile
from vllm_spindle.evaluation import needle
from vllm_spindle.policy import SpindlePolicy
from vllm_spindle.serving.load import ask_all
from vllm_spindle.serving.metrics import Metrics
from vllm_spindle.serving.server import VllmServer

NEEDLE = Path(__file__).parents[2] / "models" / "needle"
BLOCK_SIZE = 32
PROMPT_LEN = 1024
SEED = 2_000_003
NUM_QUESTIONS = 48
BAND_COUNTERS = ("blocks_freed", "tokens_evicted", "prompt_blocks", "held_blocks")


@pytest.fixture(scope="module")
def policy() -> SpindlePolicy:
    """The plan's arithmetic, from the model's config.json."""
    shape = read_geometry(str(NEEDLE))
    config = with_profile(SpindleConfig(keep_ratio=0.25), str(NEEDLE))
    return SpindlePolicy(config, shape.num_layers, BLOCK_SIZE, shape.num_queries_per_kv)


@pytest.fixture(scope="module")
def client(server: VllmServer) -> openai.OpenAI:
    """The official client."""
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def questions() -> list[needle.NeedleQuestion]:
    """Held-out questions of ``PROMPT_LEN`` tokens."""
    return needle.make_questions(NUM_QUESTIONS, PROMPT_LEN, seed=SEED)


def _counts(metrics: Metrics, name: str, num_bands: int) -> list[float]:
    by_band = metrics.by_label(f"vllm:spindle_{name}_total", "band")
    return [by_band.get(str(band), 0.0) for band in range(num_bands)]


def _wait_until_idle(server: VllmServer) -> Metrics:
    deadline = time.monotonic() + 30
    while True:
        metrics = server.metrics()
        if metrics.total("vllm:num_requests_running") == 0 and metrics.used_blocks == 0:
            return metrics
        assert time.monotonic() < deadline, "requests or blocks are left after 30 s"
        time.sleep(0.2)


def test_metrics_are_there_before_the_first_request(server: VllmServer) -> None:
    """Reductions and their seconds are on /metrics from the start, beside vLLM's own."""
    metrics = server.metrics()
    assert metrics.total("vllm:spindle_reductions_total") >= 0
    assert metrics.total("vllm:spindle_reduction_seconds_total") >= 0
    assert metrics.total("vllm:num_requests_running") == 0


def test_a_completion_answers(
    client: openai.OpenAI, server: VllmServer, questions: list[needle.NeedleQuestion]
) -> None:
    """The official client gets a text of the asked length, greedily the same twice."""
    replies = [
        client.completions.create(
            model=server.model, prompt=questions[0].prompt, max_tokens=8, temperature=0
        )
        for _ in range(2)
    ]
    assert replies[0].usage.prompt_tokens == PROMPT_LEN
    assert replies[0].choices[0].text
    assert replies[0].choices[0].text == replies[1].choices[0].text


def test_a_chat_answers_as_a_completion(
    client: openai.OpenAI, server: VllmServer, questions: list[needle.NeedleQuestion]
) -> None:
    """The chat endpoint sees the same prompt, reduced, and gives the same answer."""
    before = server.metrics().total("vllm:spindle_reductions_total")
    chat = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": questions[1].prompt}],
        max_tokens=8,
        temperature=0,
        extra_body={"add_special_tokens": True},
    )
    plain = client.completions.create(
        model=server.model, prompt=questions[1].prompt, max_tokens=8, temperature=0
    )
    assert chat.usage.prompt_tokens == plain.usage.prompt_tokens == PROMPT_LEN
    assert chat.choices[0].message.content.split() == plain.choices[0].text.split()
    assert server.metrics().total("vllm:spindle_reductions_total") == before + 2


def test_a_stream_adds_up_to_the_whole(
    client: openai.OpenAI, server: VllmServer, questions: list[needle.NeedleQuestion]
) -> None:
    """Streamed pieces, joined, are the answer that comes in one piece."""
    request = {"model": server.model, "prompt": questions[2].prompt, "max_tokens": 40}
    request |= {"temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**request)
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]
    assert len(pieces) > 1  # vLLM joins what a slow client has not taken
    assert "".join(pieces) == whole.choices[0].text


def test_parallel_samples_are_reduced_each(
    client: openai.OpenAI, server: VllmServer, questions: list[needle.NeedleQuestion]
) -> None:
    """n=2 gives two answers, each from a prompt of its own that was reduced."""
    before = server.metrics().total("vllm:spindle_reductions_total")
    reply = client.completions.create(
        model=server.model, prompt=questions[3].prompt, max_tokens=8, n=2, temperature=1, seed=1
    )
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert all(choice.text for choice in reply.choices)
    assert server.metrics().total("vllm:spindle_reductions_total") == before + 2


@pytest.mark.parametrize("keep_ratio", [None, 0.5, 0.15, 1.0])
def test_blocks_held_are_the_planned_ones(
    server: VllmServer,
    policy: SpindlePolicy,
    questions: list[needle.NeedleQuestion],
    keep_ratio: float | None,
) -> None:
    """After prefill a request holds its plan's blocks: the server's ratio, or its own.

    ``held_blocks`` is counted in the scheduler's rows. vLLM's own gauge shows the same for a few
    milliseconds at a time, which a server on two busy cores does not get round to delivering.
    """
    bands = range(len(policy.bands))
    before = _wait_until_idle(server)
    body = {} if keep_ratio is None else {"vllm_xargs": {"spindle_keep_ratio": keep_ratio}}
    ask_all(server, [questions[4].prompt], output_len=8, **body)
    after = _wait_until_idle(server)
    plans = policy.plan(PROMPT_LEN, keep_ratio)
    # A prompt of whole blocks: what is freed are evicted tokens, one block's worth each.
    expected = {
        "blocks_freed": [plan.first_block for plan in plans],
        "tokens_evicted": [plan.first_block * BLOCK_SIZE for plan in plans],
        "prompt_blocks": [plan.prompt_blocks for plan in plans],
        "held_blocks": [plan.held_blocks for plan in plans],
    }
    for name in BAND_COUNTERS:
        was, now = _counts(before, name, len(bands)), _counts(after, name, len(bands))
        assert [now[b] - was[b] for b in bands] == expected[name], name
    reductions = [m.total("vllm:spindle_reductions_total") for m in (before, after)]
    assert reductions[1] - reductions[0] == any(plan.is_reduced for plan in plans)
    if keep_ratio is None:
        seconds = [m.total("vllm:spindle_reduction_seconds_total") for m in (before, after)]
        assert seconds[1] > seconds[0]
    held, filled = (_counts(after, name, len(bands)) for name in ("held_blocks", "prompt_blocks"))
    kept = after.by_label("vllm:spindle_kept_ratio", "band")
    assert kept == {str(b): pytest.approx(held[b] / filled[b]) for b in bands}


@pytest.mark.parametrize("protected", [0, 256])
def test_the_second_of_two_equal_prompts_hits_what_is_planned(
    server: VllmServer,
    policy: SpindlePolicy,
    questions: list[needle.NeedleQuestion],
    protected: int,
) -> None:
    """vLLM's own hit counter rises by the cap, ours by the blocks of the protected prefix."""
    options = RequestOptions(protected_prefix_tokens=protected)
    xargs = {"spindle_protected_prefix_tokens": protected}
    bands = range(len(policy.bands))
    readings = [_wait_until_idle(server)]
    for _ in range(2):
        ask_all(server, [questions[6 + bool(protected)].prompt], output_len=8, vllm_xargs=xargs)
        readings.append(_wait_until_idle(server))
    hits = [metrics.total("vllm:prefix_cache_hits_total") for metrics in readings]
    planned = min(policy.shareable(PROMPT_LEN, options)) * BLOCK_SIZE
    assert [hits[1] - hits[0], hits[2] - hits[1]] == [0, planned]
    assert planned >= protected
    held = [_counts(metrics, "protected_blocks", len(bands)) for metrics in readings]
    plans = policy.plan_request(PROMPT_LEN, options)
    for was, now in zip(held, held[1:], strict=False):
        assert [now[b] - was[b] for b in bands] == [plan.prefix_blocks for plan in plans]
    assert (sum(plan.prefix_blocks for plan in plans) > 0) == bool(protected)


@pytest.mark.parametrize(
    ("xargs", "parts"),
    [
        ({"spindle_keep_ratio": 1.5}, ["spindle_keep_ratio", "(0, 1]", "1.5"]),
        ({"spindle_keep_ratio": 0}, ["spindle_keep_ratio", "(0, 1]", "0"]),
        ({"spindle_keep_ratio": -0.25}, ["spindle_keep_ratio", "(0, 1]", "-0.25"]),
        ({"spindle_keep_ratio": "0.5"}, ["spindle_keep_ratio", "number", "'0.5'"]),
        ({"spindle_keep_ratio": [0.5]}, ["spindle_keep_ratio", "number", "[0.5]"]),
        ({"spindle_keep_ratio": None}, ["spindle_keep_ratio"]),
        # vLLM's request model turns true into 1 (the whole cache) and false into 0 first.
        ({"spindle_keep_ratio": False}, ["spindle_keep_ratio", "(0, 1]"]),
        ({"spindle_protected_prefix_tokens": float("inf")}, ["whole number of tokens", "inf"]),
        ({"spindle_keep": 0.5}, ["'spindle_keep'", "did you mean 'spindle_keep_ratio'"]),
    ],
    ids=str,
)
def test_a_bad_request_is_refused_alone(
    server: VllmServer,
    questions: list[needle.NeedleQuestion],
    xargs: dict[str, object],
    parts: list[str],
) -> None:
    """HTTP 400 with the option, while a good request beside it is answered."""
    body = {"model": server.model, "prompt": questions[5].prompt, "max_tokens": 32}
    body |= {"temperature": 0, "ignore_eos": True}

    def post(extra: dict[str, object]) -> httpx.Response:
        text = json.dumps(body | extra)  # httpx's own would not send infinity
        headers = {"Content-Type": "application/json"}
        url = server.url + "/v1/completions"
        return httpx.post(url, content=text, headers=headers, timeout=120)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        good = pool.submit(post, {})
        bad = post({"vllm_xargs": xargs})
    assert bad.status_code == 400
    message = bad.json()["error"]["message"]
    assert [part for part in parts if part not in message] == []
    assert good.result().status_code == 200
    assert good.result().json()["usage"]["completion_tokens"] == 32


def test_a_beam_search_is_refused(server: VllmServer) -> None:
    """HTTP 400, as nothing that was reduced would ever be read."""
    body = {"model": server.model, "prompt": "The quick brown fox", "max_tokens": 4, "n": 2}
    found = httpx.post(server.url + "/v1/completions", json=body | {"use_beam_search": True})
    assert found.status_code == 400
    assert "beam search is not supported with spindle" in found.json()["error"]["message"]
    assert httpx.post(server.url + "/v1/completions", json=body, timeout=120).status_code == 200


def test_a_client_that_leaves_gives_its_blocks_back(
    server: VllmServer, questions: list[needle.NeedleQuestion]
) -> None:
    """Disconnecting in the middle of a stream, during decode or prefill, leaks no block."""
    _wait_until_idle(server)
    body = {"model": server.model, "max_tokens": 900, "ignore_eos": True, "stream": True}
    for num_lines, question in zip((0, 1, 3, 20), questions, strict=False):
        with httpx.stream(
            "POST",
            server.url + "/v1/completions",
            json=body | {"prompt": question.prompt},
            timeout=120,
        ) as reply:
            lines = reply.iter_lines()
            for _ in range(num_lines):
                next(lines)
    metrics = _wait_until_idle(server)
    assert metrics.total("vllm:kv_cache_usage_perc") == 0


def test_questions_at_a_quarter_of_the_cache(
    server: VllmServer, questions: list[needle.NeedleQuestion]
) -> None:
    """More requests run at once than whole prompts fit: 10 would fill the memory.

    Long answers, so that a busy machine that takes requests in slowly has many at once too.
    """
    load = ask_all(server, [question.prompt for question in questions], output_len=96)
    assert load.peak_running >= 15
    assert load.output_tokens == 96 * len(questions)
    assert _wait_until_idle(server).used_blocks == 0
