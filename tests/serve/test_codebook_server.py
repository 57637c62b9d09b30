"""A server whose bands hold codebooks, from a preset: its counts are on ``/metrics``."""

from collections.abc import Callable
from pathlib import Path

import httpx
import yaml

from vllm_spindle.commands.geometry import read_geometry
from vllm_spindle.config import SpindleConfig
from vllm_spindle.evaluation import needle
from vllm_spindle.policy import SpindlePolicy
from vllm_spindle.serving.server import VllmServer

PRESET = Path(__file__).parents[2] / "configs" / "spindle" / "both_50.yaml"
PROMPT_LEN, BLOCK_SIZE, NUM_REQUESTS = 1024, 32, 3


def test_entries_overflow_and_similarity_are_counted(
    make_server: Callable[[object], VllmServer],
) -> None:
    """Per band: tokens merged, entries within their capacity, what overflowed, how alike."""
    prompts = [q.prompt for q in needle.make_questions(NUM_REQUESTS, PROMPT_LEN, seed=5)]
    with make_server(str(PRESET)) as server:
        for prompt in prompts:
            request = {"model": server.model, "prompt": prompt, "max_tokens": 4, "temperature": 0}
            reply = httpx.post(f"{server.url}/v1/completions", json=request, timeout=120)
            assert reply.raise_for_status().json()["usage"]["completion_tokens"] == 4
        shape, metrics = read_geometry(server.model), server.metrics()
    config = SpindleConfig(**yaml.safe_load(PRESET.read_text(encoding="utf-8")))
    policy = SpindlePolicy(config, shape.num_layers, BLOCK_SIZE, shape.num_queries_per_kv)
    plans = policy.plan(PROMPT_LEN)
    for band, plan in enumerate(plans):
        counts = {
            name: metrics.total(f"vllm:spindle_{name}_total", band=str(band))
            for name in (
                *("tokens_merged", "codebook_vectors", "codebook_entries", "codebook_capacity"),
                *("codebook_overflow", "codebook_similarity_sum", "held_blocks"),
            )
        }
        assert counts["held_blocks"] == NUM_REQUESTS * plan.held_blocks
        assert counts["tokens_merged"] > 0
        assert 0 < counts["codebook_entries"] <= counts["codebook_capacity"]
        assert counts["codebook_entries"] <= counts["codebook_vectors"]
        mean_similarity = counts["codebook_similarity_sum"] / counts["codebook_vectors"]
        assert min(config.theta_key, config.theta_value) <= mean_similarity <= 1 + 1e-5
        assert counts["codebook_overflow"] >= 0
