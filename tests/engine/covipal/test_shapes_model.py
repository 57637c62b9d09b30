"""The shipped models that see: vLLM loads them as they are, and says what transformers says."""

from pathlib import Path
from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine

MODELS = Path(__file__).parents[3] / "models"
NUM_QUESTIONS = 20
SEED = 77


def by_vllm(model: str, world: str) -> list[dict[str, Any]]:
    """Per question: prompt tokens and generated tokens."""
    from vllm import LLM, SamplingParams

    from vllm_covipal.evaluation import scenes, shapes

    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=4,
        block_size=32,
        kv_cache_memory_bytes=128 << 20,
        limit_mm_per_prompt={"image": 1},
    )
    requests = [
        {"prompt": question.prompt, "multi_modal_data": {"image": scenes.draw(question.scene)}}
        for question in shapes.make_questions(NUM_QUESTIONS, seed=SEED, world=scenes.WORLDS[world])
    ]
    sampling = SamplingParams(temperature=0, max_tokens=shapes.MAX_NEW_TOKENS)
    return [
        {"prompt": output.prompt_token_ids, "answer": list(output.outputs[0].token_ids)}
        for output in llm.generate(requests, sampling, use_tqdm=False)
    ]


def by_transformers(model: str, world: str) -> list[dict[str, Any]]:
    """The same from transformers."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from vllm_covipal.evaluation import scenes, shapes

    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(model)
    llava = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    answers = []
    for question in shapes.make_questions(NUM_QUESTIONS, seed=SEED, world=scenes.WORLDS[world]):
        inputs = processor(
            images=scenes.draw(question.scene), text=question.prompt, return_tensors="pt"
        )
        prompt = inputs["input_ids"][0].tolist()
        generated = llava.generate(**inputs, max_new_tokens=shapes.MAX_NEW_TOKENS)
        answers.append({"prompt": prompt, "answer": generated[0].tolist()[len(prompt) :]})
    return answers


@pytest.fixture(scope="module", params=("shapes", "crowd"))
def world(request) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def answers(world) -> list[dict[str, Any]]:
    return in_child(by_vllm, model=str(MODELS / world), world=world)


def test_vllm_says_what_transformers_says(answers, world):
    """The same prompt tokens and the same greedy answers, question by question, in float32."""
    assert answers == in_child(by_transformers, model=str(MODELS / world), world=world)


def test_vllm_sees(answers, world):
    """Questions about one thing are answered right: the weights are where they belong."""
    from transformers import AutoTokenizer

    from vllm_covipal.evaluation import scenes, shapes

    tokenizer = AutoTokenizer.from_pretrained(MODELS / world)
    questions = shapes.make_questions(NUM_QUESTIONS, seed=SEED, world=scenes.WORLDS[world])
    about_one = [
        shapes.is_exact(tokenizer.decode(each["answer"], skip_special_tokens=True), question)
        and each["answer"][-1] == tokenizer.eos_token_id
        for each, question in zip(answers, questions, strict=True)
        if question.type in ("single", "marks")
    ]
    assert sum(about_one) >= len(about_one) - 1 >= 9
