"""LoRA on the language model: what is chosen is what is chosen without, whoever has an adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine

OPTIONS = {"selector": "cdpruner", "keep_ratio": 0.25, "reuse_mib": 0}
RANK = 8


def _write_adapter(folder: Path, vocabulary: int, width: int) -> str:
    """An adapter of one projection and of the embeddings, random and large."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    of_model = "base_model.model.model.language_model"
    query, embedding = f"{of_model}.layers.0.self_attn.q_proj.lora", f"{of_model}.embed_tokens.lora"
    generator = torch.Generator().manual_seed(0)
    shapes = {
        f"{query}_A.weight": (RANK, width),
        f"{query}_B.weight": (width, RANK),
        f"{embedding}_embedding_A": (RANK, vocabulary),
        f"{embedding}_embedding_B": (width, RANK),
    }
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "bias": "none",
        "target_modules": ["q_proj", "embed_tokens"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def chosen(model: str, family: str, adapter_folder: str) -> dict[str, Any]:
    """Rows kept and tokens, by who has the adapter."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    import tiny_lvlm
    from engine_probe.lvlm import LvlmAsk, Watch, lvlm_engine, model_of

    folder = _write_adapter(Path(adapter_folder), tiny_lvlm.SIZE, tiny_lvlm.WIDTH)
    adapter = LoRARequest("adapter", 1, folder)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    asked = LvlmAsk("@ what is the color of red blue circle square ?", [(64, 64, 1)])
    words = LvlmAsk("what is red ?")
    ways: dict[str, tuple[list[Any], list[Any]]] = {
        "nobody": ([asked], [None]),
        "itself": ([asked], [adapter]),
        "another, before": ([words, asked], [adapter, None]),
        "another, behind": ([asked, words], [None, adapter]),
    }
    found: dict[str, Any] = {}
    caches = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}
    with lvlm_engine(model, family, OPTIONS, enable_lora=True, max_lora_rank=RANK, **caches) as llm:
        watch = Watch(model_of(llm))
        for name, (asks, adapters) in ways.items():
            watch.clear()
            outputs = llm.generate(
                [ask.prompt(family) for ask in asks],
                params,
                lora_request=adapters,
                use_tqdm=False,
            )
            tokens = list(outputs[asks.index(asked)].outputs[0].token_ids)
            found[name] = {"rows": [i.tolist() for i in watch.indices], "tokens": tokens}
    return found


def test_an_adapter_does_not_choose(lvlm: Callable[[str], str], tmp_path: Path) -> None:
    """The question is read with the model's own embeddings: rows are cached for every adapter."""
    found = in_child(
        chosen, model=lvlm("llava"), family="llava", adapter_folder=str(tmp_path / "adapter")
    )
    for name in ("itself", "another, before", "another, behind"):
        assert found[name]["rows"] == found["nobody"]["rows"], name
    assert found["itself"]["tokens"] != found["nobody"]["tokens"]  # the adapter is at work
