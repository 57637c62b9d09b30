"""A plan that calibration wrote, served: on one rank and on two."""

from pathlib import Path
from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine

NEEDLE = str(Path(__file__).parents[2] / "models/needle")
# In the layer that merging leaves exact, as a plan of that model would have it.
MERGED = {"keep_ratio": 0.3, "band_methods": ["merge", *["evict"] * 5]}
NUM_WORDS = 12
LENGTHS = [700, 511, 300, 900]
# Two ranks first: a one-rank engine binds its very process to its cores.
RANKS: dict[str, dict[str, Any]] = {
    "two": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    "one": {},
}


def served(model: str, folder: str) -> dict[str, Any]:
    """Calibrate on few words, then serve them from the file: plan, counts and tokens."""
    import json
    import os

    import torch

    from engine_probe.engines import Ask, engine
    from engine_probe.plan_watch import PlanWatch
    from vllm_spindle import cli
    from vllm_spindle.config import load_config

    generator = torch.Generator().manual_seed(3)
    prompts = [
        torch.randint(5, 5 + NUM_WORDS, (length,), generator=generator).tolist()
        for length in LENGTHS
    ]
    lines = [json.dumps({"prompt_token_ids": prompt}) for prompt in prompts[:2]]
    file, plan = Path(folder) / "prompts.jsonl", Path(folder) / "plan.yaml"
    file.write_text("\n".join(lines))
    argv = ["calibrate", model, "--prompts", str(file), "--out", str(plan), "--keep-ratio", "0.3"]
    cli.main([*argv, "--num-bands", "6", "--key-share", "0.5", "--new-tokens", "2"])
    found: dict[str, Any] = {"methods": load_config(str(plan)).band_methods}
    for ranks, options in RANKS.items():
        if ranks == "two":
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
        else:
            os.environ.pop("VLLM_CPU_OMP_THREADS_BIND", None)
        with engine(model, str(plan), **options) as running:
            watch = PlanWatch(running)
            found[ranks] = {
                "tokens": running.run([Ask(prompt, 4) for prompt in prompts]),
                "bands": running.scheduler._stats["bands"],
                **watch.report(),
            }
        with engine(NEEDLE, MERGED, **options) as running:
            found[ranks]["answers"] = running.run([Ask(q, 5) for q in _questions()])
    return found


def _questions() -> list[list[int]]:
    from transformers import AutoTokenizer

    from vllm_spindle.evaluation.needle import make_questions

    tokenizer = AutoTokenizer.from_pretrained(NEEDLE)
    return [tokenizer(question.prompt).input_ids for question in make_questions(8, 700, seed=11)]


@pytest.fixture(scope="module")
def runs(llama: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_child(served, model=llama, folder=str(tmp_path_factory.mktemp("plan")))


@pytest.mark.parametrize("ranks", RANKS)
def test_a_calibrated_plan_is_held(runs: dict[str, Any], ranks: str) -> None:
    """The file's bands, with a codebook where it says so, in the blocks that were planned."""
    found = runs[ranks]
    assert found["problems"] == []
    assert found["idle_free"]
    assert found["left_over"] == []
    assert found["reduced_rows"] > 0
    # On few words layer 0 repeats: calibration merges it.
    assert runs["methods"][0] in ("merge", "both")
    merged = [count > 0 for count in found["bands"]["tokens_merged"]]
    assert merged == [method != "evict" for method in runs["methods"]]


def test_two_ranks_merge_as_one(runs: dict[str, Any]) -> None:
    """Each rank builds the codebooks of its own kv heads, half of them, as one rank does.

    Answers are a trained model's: codebooks are bfloat16, in which two ranks' sums round otherwise
    than one's, in stock vLLM too, and a random model's next tokens are all but ties.
    """
    one, two = runs["one"], runs["two"]
    assert one["bands"]["held_blocks"] == two["bands"]["held_blocks"]
    assert one["bands"]["tokens_merged"][0] == pytest.approx(two["bands"]["tokens_merged"][0], 0.05)
    for name in ("codebook_vectors", "codebook_capacity"):
        assert one["bands"][name][0] == pytest.approx(2 * two["bands"][name][0], 0.05)
    assert len({tuple(answer) for answer in one["answers"]}) == len(one["answers"]) == 8
    assert one["answers"] == two["answers"]
