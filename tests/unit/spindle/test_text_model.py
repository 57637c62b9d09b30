"""The bundled text model is a yardstick: it passes its gates, and a model that should not does not.

A small sample; ``models/text/evaluate.py`` has more.
"""

from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_spindle.evaluation.passages import CUE_TOKENS, KINDS, make_passages
from vllm_spindle.evaluation.source import tokenized_files
from vllm_spindle.evaluation.text_gates import Gates, measure_gates

TEXT = Path(__file__).parents[3] / "models/text"
NUM_PASSAGES = 10
NUM_NEXT = 48
SEED = 5


@pytest.fixture(scope="module")
def passages() -> Any:
    """Natural ones and repeated ones, of held-out files."""
    tokenizer = AutoTokenizer.from_pretrained(TEXT)
    files = tokenized_files(tokenizer, held_out=True)
    return [
        make_passages(
            files,
            kind,
            NUM_PASSAGES,
            prompt_tokens=(900, 1000),
            num_next=NUM_NEXT,
            bos=tokenizer.bos_token_id,
            seed=SEED,
        )
        for kind in KINDS
    ]


@pytest.fixture(scope="module")
def gates(passages: Any) -> Gates:
    model = AutoModelForCausalLM.from_pretrained(TEXT, dtype=torch.float32).eval()
    return measure_gates(model, *passages)


def test_a_passage_is_what_it_says(passages: Any) -> None:
    """What repeats stands in the prompt, and so does its cue, which ends the prompt."""
    natural, repeated = passages
    assert all(passage.first is None for passage in natural)
    for passage in repeated:
        first, prompt = passage.first, passage.prompt_ids
        assert prompt[first : first + NUM_NEXT] == passage.next_ids
        assert prompt[first - CUE_TOKENS : first] == prompt[-CUE_TOKENS:]


def test_context_is_used(gates: Gates) -> None:
    """A file goes on less surprisingly after some 950 tokens of it than after 64."""
    assert mean(gates.long) <= mean(gates.short) - 0.1


def test_repeated_passages_are_predicted(gates: Gates) -> None:
    """Said again, a passage costs far less than where it is said first."""
    assert mean(gates.second) <= 0.6 * mean(gates.first)


def test_random_eviction_loses(gates: Gates) -> None:
    """A quarter of the cache, left at random, is not enough: both kinds, and far from full."""
    assert mean(gates.random) >= mean([*gates.long, *gates.second]) + 0.2
    assert mean(gates.random_divergence) >= 0.2


def test_a_model_that_looks_up_nothing_is_told(passages: Any) -> None:
    """With the layers above the first cut off from earlier tokens, the gates do not open."""
    model = AutoModelForCausalLM.from_pretrained(TEXT, dtype=torch.float32).eval()
    for layer in model.model.layers[1:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    natural, repeated = passages
    blind = measure_gates(model, natural[:4], repeated[:4])
    assert mean(blind.second) > 0.6 * mean(blind.first)
    assert mean(blind.random_divergence) < 0.2
