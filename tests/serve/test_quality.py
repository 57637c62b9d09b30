"""Needle questions over HTTP: eviction by score, and random eviction of the same bytes beside it.

Run with: pytest tests/serve/test_quality.py
"""

from collections.abc import Iterator

import pytest

from vllm_spindle.evaluation import needle
from vllm_spindle.serving.load import ask_all
from vllm_spindle.serving.server import VllmServer

NUM_QUESTIONS = 32
PROMPT_LEN = 512
RATIOS = (0.5, 0.25, 0.15)
QUESTIONS = needle.make_questions(NUM_QUESTIONS, PROMPT_LEN, seed=3_000_017)


def num_exact(server: VllmServer, keep_ratio: float) -> int:
    """Of ``QUESTIONS``, asked all at once, those answered word for word."""
    load = ask_all(
        server,
        [question.prompt for question in QUESTIONS],
        output_len=needle.MAX_NEW_TOKENS,
        vllm_xargs={"spindle_keep_ratio": keep_ratio},
    )
    exact = sum(map(needle.is_exact, load.texts, QUESTIONS))
    print(f"{server.log_path.parent.name} keep {keep_ratio}: {exact} of {NUM_QUESTIONS} exact")
    return exact


@pytest.fixture(scope="module")
def full_exact(server: VllmServer) -> int:
    """Questions answered exactly with the whole cache."""
    return num_exact(server, 1.0)


@pytest.fixture(scope="module")
def random_server(make_server) -> Iterator[VllmServer]:
    """The same server, but which tokens are kept is left to chance, and how many each head keeps
    is not measured: heads that look things up would keep most of theirs, whichever they are."""
    with make_server({"keep_ratio": 0.25, "score": "random", "budget": "uniform"}) as running:
        yield running


def test_the_whole_cache_answers(full_exact: int) -> None:
    """There is something to lose: at least 98 % are exact with the whole cache."""
    assert full_exact >= 0.98 * NUM_QUESTIONS


@pytest.mark.parametrize("keep_ratio", RATIOS)
def test_needles_are_found_after_eviction(
    server: VllmServer, full_exact: int, keep_ratio: float
) -> None:
    """Exact answers at a reduced cache are at least 98 % of the whole cache's."""
    assert num_exact(server, keep_ratio) >= 0.98 * full_exact


@pytest.mark.parametrize(("keep_ratio", "most"), [(0.5, 0.85), (0.25, 0.5), (0.15, 0.25)])
def test_random_eviction_loses_them(
    random_server: VllmServer, keep_ratio: float, most: float
) -> None:
    """The same bytes, kept at random, answer far fewer: the score is what finds them."""
    assert num_exact(random_server, keep_ratio) <= most * NUM_QUESTIONS
