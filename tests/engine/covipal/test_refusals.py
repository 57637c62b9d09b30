"""What covipal cannot serve stops at start-up: one message with option, value, reason, way out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine_child import in_child

pytestmark = pytest.mark.engine

ON = {"selector": "divprune", "keep_ratio": 0.5}
NEEDLE = str(Path(__file__).parents[3] / "models" / "needle")

# name: (family, value of "covipal", vLLM flags, what the message must say, in order)
CASES: dict[str, tuple[str, Any, dict[str, Any], list[str]]] = {
    "text-model": (NEEDLE, ON, {}, ["model=LlamaForCausalLM", "LlavaFor", "without covipal"]),
    "encoder-graphs": (
        "llava",
        ON,
        {"compilation_config": {"cudagraph_mm_encoder": True}},
        ["cudagraph_mm_encoder=True", "choice of rows", "leave encoder CUDA graphs off"],
    ),
    "tower-lora": (
        "llava",
        ON,
        {"enable_lora": True, "enable_tower_connector_lora": True},
        ["enable_tower_connector_lora=True", "next question", "language model only"],
    ),
    "vllm-prunes-videos": (
        "qwen2_5_vl",
        ON,
        {"video_pruning_rate": 0.5},
        ["video_pruning_rate=0.5", "as well", "set one of the two"],
    ),
    "ratio-of-every-request": (
        "llava",
        ON,
        {"mm_processor_kwargs": {"covipal_keep_ratio": 1.0}},
        ["--mm-processor-kwargs", "one request", "'covipal': {'keep_ratio': ...}"],
    ),
    "ratio-of-every-request-off": (
        "llava",
        None,
        {"mm_processor_kwargs": {"covipal_keep_ratio": 0.5}},
        ["--mm-processor-kwargs", "one request", "'covipal': {'keep_ratio': ...}"],
    ),
    "speculation": (
        "llava",
        ON,
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        ["speculative_config=set", "unpruned prompt", "without speculative decoding"],
    ),
    "pipeline-parallel": (
        "qwen2_5_vl",
        ON,
        {"pipeline_parallel_size": 2},
        ["--pipeline-parallel-size=2", "first rank", "leave --pipeline-parallel-size at 1"],
    ),
    "no-ppm": ("llava", {"keep_ratio": 0.5}, {}, ["selector 'ppm'", "set 'ppm'", "divprune"]),
    "ppm-nowhere": (
        "llava",
        {"ppm": "/nowhere"},
        {},
        ["ppm='/nowhere'", "cannot read", "config.json"],
    ),
    "ratio": ("llava", {**ON, "keep_ratio": 0}, {}, ["keep_ratio=0", "greater than 0"]),
    "misspelt": ("llava", {**ON, "keep_ration": 0.5}, {}, ["keep_ration", "'keep_ratio'"]),
    "no-file": ("llava", "/nowhere.yaml", {}, ["/nowhere.yaml", "give the path"]),
}


def messages(folders: dict[str, str], other_ppm: str) -> dict[str, str]:
    """What each combination is told; empty if it is accepted."""
    from vllm.engine.arg_utils import EngineArgs

    cases = {name: case[:3] for name, case in CASES.items()}
    cases["ppm-of-another"] = ("llava", {"ppm": other_ppm}, {})
    cases["accepted"] = ("llava", ON, {})
    found = {}
    for name, (model, covipal, flags) in cases.items():
        args = EngineArgs(
            folders.get(model, model),
            max_model_len=512,
            additional_config={} if covipal is None else {"covipal": covipal},
            **flags,
        )
        try:
            args.create_engine_config()
            found[name] = ""
        except ValueError as error:
            found[name] = str(error)
    found["rust-frontend"] = _with_rust_frontend(folders["llava"])
    return found | _elsewhere(folders["llava"])


def _with_rust_frontend(model: str) -> str:
    """What start-up says where vLLM's compiled front process is asked for."""
    from unittest.mock import patch

    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(model, max_model_len=512, additional_config={"covipal": ON})
    with patch.dict("os.environ", VLLM_USE_RUST_FRONTEND="1"):
        try:
            args.create_engine_config()
        except ValueError as error:
            return str(error)
    return ""


def _elsewhere(model: str) -> dict[str, str]:
    """What start-up says on other platforms than the CPU."""
    import logging
    from types import SimpleNamespace
    from unittest.mock import patch

    from vllm.engine.arg_utils import EngineArgs

    from vllm_covipal.engine import refusals, startup

    config = EngineArgs(model, max_model_len=512).create_engine_config()
    config.additional_config["covipal"] = ON
    stock = config.model_config.hf_config.architectures
    found = {}
    for name in ("cuda", "rocm"):
        platform = SimpleNamespace(
            device_name=name, is_cpu=lambda: False, is_cuda=lambda name=name: name == "cuda"
        )
        lines: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record, lines=lines: lines.append(record.getMessage())
        logger = logging.getLogger("vllm.covipal")
        logger.addHandler(handler)
        config.model_config.hf_config.architectures = stock
        with (
            patch.object(refusals, "current_platform", platform),
            patch.object(startup, "current_platform", platform),
        ):
            try:
                startup.prepare(config)
            except ValueError as error:
                lines.append(str(error))
        logger.removeHandler(handler)
        found[name] = "\n".join(lines)
    return found


@pytest.fixture(scope="module")
def said(lvlm: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every message, from one process."""
    from vllm_covipal.core.pruner import PruningModule, PruningModuleConfig
    from vllm_covipal.core.pruner_files import save_pruning_module

    folder = tmp_path_factory.mktemp("ppm")
    config = PruningModuleConfig.for_hidden_size(64, fingerprint="0" * 16, trained_for="another")
    save_pruning_module(PruningModule(config), folder)
    folders = {family: lvlm(family) for family in ("llava", "qwen2_5_vl")}
    return in_child(messages, folders=folders, other_ppm=str(folder))


@pytest.mark.parametrize("name", CASES)
def test_refused_with_a_way_out(said: dict[str, str], name: str) -> None:
    """The message names option and value, then the reason, then what to do instead."""
    message = said[name]
    place = 0
    for part in CASES[name][3]:
        assert part in message[place:], message
        place = message.index(part, place)


def test_a_front_process_without_plugins_is_refused(said: dict[str, str]) -> None:
    """It would hand on every picture unpruned."""
    message = said["rust-frontend"]
    assert "VLLM_USE_RUST_FRONTEND=True" in message and "no plugin" in message
    assert "unset it" in message


def test_a_module_of_another_model_is_refused_by_name(said: dict[str, str]) -> None:
    """Both models are named."""
    assert "trained for another" in said["ppm-of-another"]
    assert "llava" in said["ppm-of-another"]


def test_cuda_starts_and_says_what_was_not_seen(said: dict[str, str]) -> None:
    """One WARNING there; any other platform is refused by name."""
    assert "not yet run on a GPU by us" in said["cuda"] and "\n" not in said["cuda"]
    assert "platform=rocm" in said["rocm"] and "CPU and CUDA" in said["rocm"]


def test_a_good_configuration_is_accepted(said: dict[str, str]) -> None:
    """The messages above are not about the models themselves."""
    assert said["accepted"] == ""
