"""What spindle cannot serve stops at start-up: one message with option, value, reason, way out."""

from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine

ON = {"keep_ratio": 0.25}

# name: (vLLM flags, changes to the model's config.json, what the message must say, in order)
FLAGS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "pipeline-parallel": (
        {"pipeline_parallel_size": 2},
        {},
        ["--pipeline-parallel-size=2", "on one rank", "leave --pipeline-parallel-size at 1"],
    ),
    "decode-context-parallel": (
        {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
        {"num_key_value_heads": 1},
        ["--decode-context-parallel-size=2", "on one rank", "at 1"],
    ),
    "worker-class": (
        {"worker_cls": "vllm.v1.worker.worker_base.WorkerBase"},
        {},
        ["--worker-cls=vllm.v1.worker.worker_base.WorkerBase", "its own worker", "remove it"],
    ),
    "quantised-cache": (
        {"kv_cache_dtype": "fp8"},
        {},
        ["--kv-cache-dtype=fp8", "cannot be scored", "use --kv-cache-dtype auto"],
    ),
    "fast-prefill": (
        {"kv_sharing_fast_prefill": True},
        {},
        ["--kv-sharing-fast-prefill=True", "cut short", "leave it off"],
    ),
    "offload": (
        {"kv_offloading_size": 1.0},
        {},
        ["--kv-offloading-size=1.0", "miss the reduction", "remove it"],
    ),
    "connector": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        {},
        ["--kv-transfer-config=ExampleConnector", "copies blocks", "remove it"],
    ),
    "hybrid-manager": (
        {"disable_hybrid_kv_cache_manager": True},
        {},
        ["--disable-hybrid-kv-cache-manager=True", "separate KV-cache groups", "remove it"],
    ),
    "scheduler-class": (
        {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
        {},
        ["--scheduler-cls=vllm.v1.core.sched.scheduler.Scheduler", "its own sched", "remove it"],
    ),
    "speculation": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        {},
        ["--speculative-config=ngram", "a reduced cache", "remove it"],
    ),
    "pooling": (
        {"runner": "pooling"},
        {},
        ["runner=pooling", "only generation", "without spindle"],
    ),
}

TEXT = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}

# Model kinds by their own config.json; the message's reason.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "sliding-window": (
        {**TEXT, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
        | {"sliding_window": 512},
        "sliding-window layers",
    ),
    "sliding-layers": (
        {**TEXT, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
        | {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 512}
        | {"use_sliding_window": True},
        "sliding-window layers",
    ),
    "mla": (
        {**TEXT, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"}
        | {"kv_lora_rank": 64, "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16}
        | {
            "v_head_dim": 32,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "first_k_dense_replace": 4,
        },
        "MLA",
    ),
    "mamba": (
        {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "vocab_size": 512}
        | {"hidden_size": 128, "state_size": 16, "num_hidden_layers": 4, "expand": 2},
        "Mamba",
    ),
    "hybrid": (
        {**TEXT, "architectures": ["JambaForCausalLM"], "model_type": "jamba"}
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1},
        "Mamba and hybrid",
    ),
    "chunked-local": (
        {**TEXT, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        | {"attention_chunk_size": 512},
        "chunked-local",
    ),
    "shared-kv": (
        {**TEXT, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        | {"num_kv_shared_layers": 2},
        "share one another",
    ),
}

# What this vLLM or this machine will not configure, set on a finished configuration:
# (object of it, attribute, value): the message.
FORCED: dict[str, tuple[str, str, Any, list[str]]] = {
    "prefill-context-parallel": (
        "parallel_config",
        "prefill_context_parallel_size",
        2,
        ["--prefill-context-parallel-size=2", "on one rank", "at 1"],
    ),
    "dual-batch": ("parallel_config", "enable_dbo", True, ["--enable-dbo=True", "leave it off"]),
    "encoder-decoder": ("model_config", "is_encoder_decoder", True, ["model=", "second cache"]),
    "prefix-lm": ("model_config", "is_mm_prefix_lm", True, ["model=", "not causal"]),
    "rswa": ("model_config", "rswa_window", 64, ["model=", "frees blocks itself"]),
    "encoder-only": (
        "",
        "is_mm_encoder_only",
        True,
        ["--mm-encoder-only=True", "no KV cache to reduce"],
    ),
    "diffusion": ("model_config", "is_diffusion", True, ["model=", "more than once"]),
    "no-ops": ("model_config", "has_noops", True, ["model=", "have no attention"]),
}

# What vLLM's groups of layers reveal, of a model whose blocks are not all alike:
# (layers without attention, query heads of a kv head in each layer): the message.
BLOCKS: dict[str, tuple[list[int], list[int], list[str]]] = {
    "kv-heads": ([], [2, 4, 2, 4], ["model=blocks of [32, 64] tokens", "differ in size"]),
    "last-layer": ([3], [2, 2, 2, 2], ["model=layers [(0,), (1,), (2,)]", "one attention each"]),
    "inner-layer": ([1], [2, 2, 2, 2], ["model=layers [(0,), (2,), (3,)]", "one attention each"]),
}

# What only a layer knows: arguments of vLLM's ``Attention``; the message.
LAYERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "alibi": ({"alibi_slopes": [0.5] * 4}, ["ALiBi", "layers.1.attn", "by distance"]),
    "soft-cap": ({"logits_soft_cap": 30.0}, ["logit soft-cap", "layers.1.attn"]),
    "window": ({"per_layer_sliding_window": 64}, ["sliding window", "layers.1.attn"]),
    "plain": ({}, []),
}

# spindle's own value: the message.
OPTIONS: dict[str, tuple[Any, list[str]]] = {
    "out-of-range": ({"keep_ratio": 1.5}, ["keep_ratio=1.5", "less than or equal to 1"]),
    "zero": ({"keep_ratio": 0}, ["keep_ratio=0", "greater than 0"]),
    "typo": ({"kep_ratio": 0.5}, ["unknown key 'kep_ratio'", "did you mean 'keep_ratio'"]),
    "even-pool": (ON | {"pool_kernel": 4}, ["pool_kernel=4", "must be odd"]),
    "unknown-mode": (ON | {"gqa": "max"}, ["gqa='max'", "'union', 'mean' or 'unfold'"]),
    "prefix": (ON | {"protected_prefix_tokens": -1}, ["protected_prefix_tokens=-1", "or 'auto'"]),
    "no-file": ("configs/none.yaml", ["cannot read", "configs/none.yaml", "JSON object"]),
    "no-mapping": (0.25, ["expected a mapping", "float 0.25"]),
    "codebook-of-copies": (
        ON | {"method": "both", "gqa": "unfold"},
        ["gqa='unfold'", "use 'union' or 'mean'"],
    ),
    "too-many-bands": (ON | {"num_bands": 7}, ["num_bands=7", "only 6 layers", "at most 6"]),
}


def configure(model: str, folder: str) -> dict[str, Any]:
    """What ``create_engine_config`` raises, or says, case by case; no engine is started."""
    import json
    import logging
    from pathlib import Path

    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import registry

    # vLLM looks at each model class in a process of its own, to keep CUDA out of this one.
    registry._run_in_subprocess = lambda inspect: inspect()
    stock_config = json.loads((Path(model) / "config.json").read_text())

    def try_config(name: str, spindle: Any, flags: dict[str, Any], config: dict[str, Any]) -> Any:
        path = Path(folder) / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        lines: list[list[str]] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append([record.levelname, record.getMessage()])
        logger = logging.getLogger("vllm.spindle")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            additional = {} if spindle is None else {"additional_config": {"spindle": spindle}}
            made = EngineArgs(
                str(path), skip_tokenizer_init=True, block_size=32, **additional, **flags
            ).create_engine_config()
        except Exception as error:
            return {"error": type(error).__name__, "message": str(error)}
        finally:
            logger.removeHandler(handler)
        return {
            "lines": lines,
            "caching": made.cache_config.enable_prefix_caching,
            "worker": made.parallel_config.worker_cls,
            "scheduler": made.scheduler_config.scheduler_cls,
            "section": made.additional_config.get("spindle"),
        }

    yaml = Path(folder) / "quarter.yaml"
    yaml.write_text("keep_ratio: 0.25\ngqa: mean\n")
    found = {
        f"flag-{name}": try_config(f"flag-{name}", ON, flags, stock_config | changes)
        for name, (flags, changes, _) in FLAGS.items()
    }
    for name, (config, _) in MODELS.items():
        found[f"model-{name}"] = try_config(f"model-{name}", ON, {}, config)
        found[f"stock-{name}"] = try_config(f"stock-{name}", None, {}, config)
    for name, (value, _) in OPTIONS.items():
        found[f"option-{name}"] = try_config(f"option-{name}", value, {}, stock_config)
    two = {"kv_cache_dtype": "fp8", "pipeline_parallel_size": 2}
    no_caching = {"enable_prefix_caching": False}
    found["two"] = try_config("two", ON, two, stock_config)
    found["two-but-off"] = try_config("two-but-off", {"keep_ratio": 1.0}, two, stock_config)
    codebooks, half = ON | {"method": "both"}, {"dtype": "float16"}
    found["half"] = try_config("half", ON, half, stock_config)
    found["half-codebooks"] = try_config("half-codebooks", codebooks, half, stock_config)
    auto = ON | {"protected_prefix_tokens": "auto"}
    found["auto-no-caching"] = try_config("auto-no-caching", auto, no_caching, stock_config)
    found["on"] = try_config("on", ON, {}, stock_config)
    found["on-no-caching"] = try_config("on-no-caching", ON, no_caching, stock_config)
    found["on-yaml"] = try_config("on-yaml", str(yaml), no_caching, stock_config)
    found["off"] = try_config("off", {"keep_ratio": 1.0}, {}, stock_config)
    found["not-asked"] = try_config("not-asked", None, {}, stock_config)
    two_ranks = {"tensor_parallel_size": 2}
    found["off-tp2"] = try_config("off-tp2", {"keep_ratio": 1.0}, two_ranks, stock_config)
    found["not-asked-tp2"] = try_config("not-asked-tp2", None, two_ranks, stock_config)
    made = EngineArgs(model, skip_tokenizer_init=True, block_size=32).create_engine_config()
    found["rust"] = _with(made, VLLM_USE_RUST_FRONTEND="1")
    found["layout"] = _with(made, VLLM_KV_CACHE_LAYOUT="LHBNC")
    return {**found, **_forced(made), **_layers(made), "async": _asynchronous(made)}


def _forced(made: Any) -> dict[str, Any]:
    from unittest.mock import PropertyMock, patch

    from vllm_spindle.config import SpindleConfig
    from vllm_spindle.engine.refusals import config_refusals

    found = {}
    for name, (owner_name, attribute, value, _) in FORCED.items():
        owner = type(getattr(made, owner_name) if owner_name else made)
        with patch.object(owner, attribute, PropertyMock(return_value=value), create=True):
            refusals = config_refusals(made, SpindleConfig(**ON))
        found[f"forced-{name}"] = [str(refusal) for refusal in refusals]
    return found


def _layers(made: Any) -> dict[str, Any]:
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    from vllm_spindle.engine.refusals import layer_refusals

    torch.set_default_dtype(torch.bfloat16)
    found = {}
    for name, (options, _) in LAYERS.items():
        with set_current_vllm_config(made):
            prefix = f"{name}.layers.1.attn"
            layer = Attention(4, 32, 32**-0.5, num_kv_heads=2, prefix=prefix, **options)
        found[f"layer-{name}"] = [str(refusal) for refusal in layer_refusals(layer)]
    return found


def _with(made: Any, **environment: str) -> list[str]:
    import os
    from unittest.mock import patch

    from vllm_spindle.config import SpindleConfig
    from vllm_spindle.engine.refusals import config_refusals

    with patch.dict(os.environ, environment):
        return [str(refusal) for refusal in config_refusals(made, SpindleConfig(**ON))]


def start_uneven(folder: str) -> dict[str, str]:
    """What the worker says to models whose configuration does not tell that layers differ."""
    from pathlib import Path
    from types import SimpleNamespace
    from unittest.mock import PropertyMock, patch

    from vllm.config import ModelConfig

    import tiny
    from engine_probe.engines import Engine

    model = str(tiny.write_llama(Path(folder), num_layers=4, num_heads=4))
    found = {}
    for name, (without, groups, _) in BLOCKS.items():
        blocks = [
            SimpleNamespace(
                attention=SimpleNamespace(no_op=layer in without, n_heads_in_group=group),
                ffn=SimpleNamespace(no_op=False, intermediate_size=256),
            )
            for layer, group in enumerate(groups)
        ]

        def change(config: Any, blocks: Any = blocks) -> Any:
            config.architectures, config.block_configs = ["DeciLMForCausalLM"], blocks
            return config

        found[name] = ""
        with patch.object(ModelConfig, "has_noops", PropertyMock(return_value=False)):
            try:
                Engine(model, ON, hf_overrides=change, load_format="dummy")
            except ValueError as error:
                found[name] = str(error)
    return found


def _asynchronous(made: Any) -> str:
    """The scheduler that goes with asynchronous scheduling, which the CPU platform turns off."""
    from vllm_spindle.engine.startup import prepare

    made.additional_config["spindle"] = dict(ON)
    made.scheduler_config.async_scheduling = True
    assert prepare(made)
    return made.scheduler_config.scheduler_cls


@pytest.fixture(scope="module")
def found(llama: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_child(configure, model=llama, folder=str(tmp_path_factory.mktemp("models")))


def _assert_says(message: str, parts: list[str]) -> None:
    place = 0
    for part in parts:
        assert part in message[place:], f"{part!r} is missing, or out of order, in {message!r}"
        place = message.index(part, place)


@pytest.mark.parametrize("case", FLAGS)
def test_a_flag_is_refused(found: dict[str, Any], case: str) -> None:
    """One line: the flag with its value, why, and what to do instead."""
    refused = found[f"flag-{case}"]
    assert refused["error"] == "ValueError"
    assert len(refused["message"].splitlines()) == 1
    _assert_says(refused["message"], ["spindle does not support", *FLAGS[case][2]])


def test_auto_needs_the_prefix_cache(found: dict[str, Any]) -> None:
    """Prefixes that recur are known by the cache's hashes."""
    refused = found["auto-no-caching"]
    assert refused["error"] == "ValueError"
    _assert_says(refused["message"], ["protected_prefix_tokens=auto", "--no-enable-prefix-caching"])


def test_codebooks_are_refused_in_another_dtype(found: dict[str, Any]) -> None:
    """Eviction serves float16; codebooks are bfloat16, and say so."""
    assert "error" not in found["half"]
    message = found["half-codebooks"]["message"]
    _assert_says(message, ["--dtype=float16", "kept in bfloat16", "--dtype bfloat16"])


@pytest.mark.parametrize("case", MODELS)
def test_a_model_kind_is_refused(found: dict[str, Any], case: str) -> None:
    """One line naming the model and the reason; vLLM alone would have taken it."""
    refused = found[f"model-{case}"]
    assert "error" not in found[f"stock-{case}"]
    assert refused["error"] == "ValueError"
    assert len(refused["message"].splitlines()) == 1
    parts = ["spindle does not support model=", case, MODELS[case][1], "without spindle"]
    _assert_says(refused["message"], parts)


@pytest.mark.parametrize("case", FORCED)
def test_what_other_machines_allow_is_refused(found: dict[str, Any], case: str) -> None:
    """The same, for flags and models that vLLM configures only elsewhere."""
    (message,) = found[f"forced-{case}"]
    _assert_says(message, ["spindle does not support", *FORCED[case][-1]])


def test_a_front_end_that_checks_no_request_is_refused(found: dict[str, Any]) -> None:
    """vLLM's own in Rust, whose bad requests would reach the scheduler."""
    (message,) = found["rust"]
    _assert_says(message, ["spindle does not support VLLM_USE_RUST_FRONTEND=1", "remove it"])


def test_a_cache_with_heads_outside_of_blocks_is_refused(found: dict[str, Any]) -> None:
    """Which vLLM allows with both of CUDA's backends, but chooses nowhere there."""
    (message,) = found["layout"]
    _assert_says(message, ["VLLM_KV_CACHE_LAYOUT=LHBNC", "all of its heads", "remove it"])


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return in_child(start_uneven, folder=str(tmp_path_factory.mktemp("uneven")))


@pytest.mark.parametrize("case", BLOCKS)
def test_layers_that_are_not_alike_are_refused(uneven: dict[str, str], case: str) -> None:
    """Not before the worker has the model, but before a request comes."""
    _assert_says(uneven[case], ["spindle does not support ", *BLOCKS[case][2]])


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_is_refused(found: dict[str, Any], case: str) -> None:
    """A real attention layer names itself and what it does; a plain one is fine."""
    messages, parts = found[f"layer-{case}"], LAYERS[case][1]
    assert len(messages) == bool(parts)
    for message in messages:
        _assert_says(message, ["spindle does not support model=", *parts])


@pytest.mark.parametrize("case", OPTIONS)
def test_a_bad_option_is_refused(found: dict[str, Any], case: str) -> None:
    """One line: the option, its value, what is allowed."""
    refused = found[f"option-{case}"]
    assert refused["error"] == "ValueError"
    assert len(refused["message"].splitlines()) == 1
    _assert_says(refused["message"], ["spindle", *OPTIONS[case][1]])


def test_all_reasons_are_given_at_once(found: dict[str, Any]) -> None:
    """Two refusals are two lines of one error."""
    lines = found["two"]["message"].splitlines()
    assert len(lines) == 2
    assert all(line.startswith("spindle does not support --") for line in lines)


def test_off_refuses_nothing(found: dict[str, Any]) -> None:
    """With keep_ratio 1.0 the engine is stock, so every flag that stock takes is fine."""
    assert "error" not in found["two-but-off"]


def test_prefix_caching_stays_as_the_user_has_it(found: dict[str, Any]) -> None:
    """vLLM's default, or the flag; no WARNING."""
    assert found["on"]["caching"] is found["not-asked"]["caching"] is True
    assert found["on-no-caching"]["caching"] is False
    for case in ("on", "on-no-caching"):
        assert [level for level, _ in found[case]["lines"]] == ["INFO"]


def test_one_info_line_says_what_is_on(found: dict[str, Any]) -> None:
    """Ratio, modes and the layers of each band; a YAML file counts as its options."""
    (line,) = [text for level, text in found["on"]["lines"] if level == "INFO"]
    _assert_says(line, ["SpindleKV on", "keep_ratio=0.25", "gqa=union", "0-1 | 2-3 | 4-5"])
    (line,) = [text for level, text in found["on-yaml"]["lines"] if level == "INFO"]
    _assert_says(line, ["keep_ratio=0.25", "gqa=mean"])
    # Workers may not find the file again, so they get its contents.
    assert found["on-yaml"]["section"]["gqa"] == "mean"


def test_on_brings_worker_and_scheduler(found: dict[str, Any]) -> None:
    """Spindle's own classes, chosen through vLLM's own selectors."""
    assert found["on"]["worker"] == "vllm_spindle.processes.worker_cpu.SpindleCPUWorker"
    assert found["on"]["scheduler"] == "vllm_spindle.processes.scheduler.SpindleScheduler"
    assert found["async"] == "vllm_spindle.processes.scheduler.SpindleAsyncScheduler"


@pytest.mark.parametrize("ranks", ["", "-tp2"])
def test_off_leaves_the_configuration_alone(found: dict[str, Any], ranks: str) -> None:
    """keep_ratio 1.0 says so in one INFO line and changes nothing; not asked, not a word."""
    off, stock = found[f"off{ranks}"], found[f"not-asked{ranks}"]
    assert [level for level, _ in off["lines"]] == ["INFO"]
    assert "stock" in off["lines"][0][1]
    assert stock["lines"] == []
    for key in ("caching", "worker", "scheduler"):
        assert off[key] == stock[key]
    assert stock["caching"]
