"""What can be known of the CUDA path without a GPU: classes, refusals, and where tensors are.

The platform is made to answer as CUDA's. Kernels, graphs and steps: ``test_triton_backend.py``,
``test_runner_v2.py``. Tensors here are on torch's device "meta": they cannot be mixed with the
CPU's nor looked at, so that neither a forgotten copy nor a wait for the device goes unnoticed.
"""

from typing import Any

import pytest

import tiny
from engine_child import in_child

pytestmark = pytest.mark.engine

ON = {"keep_ratio": 0.25}
HEAD_SHARES = tiny.head_shares(num_layers=6, num_heads=2)
MEASURED = ON | {"budget": "measured", "head_shares": HEAD_SHARES}

# name: (object of the configuration, attribute, value; spindle's options; the message)
REFUSED: dict[str, tuple[tuple[str, str, Any] | None, dict[str, Any], list[str]]] = {
    "runner v1": (
        ("", "use_v2_model_runner", False),
        ON,
        ["VLLM_USE_V2_MODEL_RUNNER=0", "model runner V2", "remove it"],
    ),
    "unfold": (None, ON | {"gqa": "unfold"}, ["gqa=unfold", "on the CPU alone", "union or mean"]),
    "backend": (
        ("attention_config", "backend", "FLASHINFER"),
        ON,
        ["--attention-backend=FLASHINFER", "FLASH_ATTN or TRITON_ATTN"],
    ),
    "worker class": (
        ("parallel_config", "worker_cls", "my.Worker"),
        ON,
        ["--worker-cls=my.Worker", "its own worker"],
    ),
}


def configure(model: str) -> dict[str, Any]:
    """What start-up makes of a configuration on a CUDA platform, or says."""
    import logging
    from contextlib import ExitStack
    from types import SimpleNamespace
    from unittest.mock import PropertyMock, patch

    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import registry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_spindle.config import SpindleConfig
    from vllm_spindle.engine import layers, platforms, refusals, startup
    from vllm_spindle.engine.memory import reserved_bytes

    registry._run_in_subprocess = lambda inspect: inspect()
    lines: list[list[str]] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append([record.levelname, record.getMessage()])

    def platform(name: str) -> Any:
        answers = {"is_cpu": lambda: name == "cpu", "is_cuda": lambda: name == "cuda"}
        pretended = SimpleNamespace(device_name=name, **answers)
        stack = ExitStack()
        for module in (platforms, refusals):
            stack.enter_context(patch.object(module, "current_platform", pretended))
        return stack

    def made(**flags: Any) -> Any:
        config = EngineArgs(
            model, skip_tokenizer_init=True, block_size=32, **flags
        ).create_engine_config()
        config.parallel_config.worker_cls = platforms.CUDA.stock_worker
        return config

    config, half = made(), made(dtype="float16")
    logging.getLogger("vllm.spindle").addHandler(handler)  # vLLM has set up its logging by now
    v2 = patch.object(type(config), "use_v2_model_runner", PropertyMock(return_value=True))
    found: dict[str, Any] = {}
    with platform("rocm"):
        found["rocm"] = [str(r) for r in refusals.config_refusals(config, SpindleConfig(**ON))]
    with platform("cuda"), v2:
        for name, (change, options, _) in REFUSED.items():
            owner, attribute, value = change or ("parallel_config", "world_size", 1)
            owner = type(getattr(config, owner) if owner else config)
            value = AttentionBackendEnum[value] if attribute == "backend" else value
            with patch.object(owner, attribute, PropertyMock(return_value=value), create=True):
                said = refusals.config_refusals(config, SpindleConfig(**options))
            found[name] = [str(each) for each in said]
        found["good"] = [str(r) for r in refusals.config_refusals(config, SpindleConfig(**ON))]
        both = SpindleConfig(**ON, method="both")
        found["float16 codebooks"] = [str(r) for r in refusals.config_refusals(half, both)]
        measured = SpindleConfig(**MEASURED)
        for backend in (None, *map(AttentionBackendEnum.__getitem__, platforms.CUDA.backends)):
            with patch.object(config.attention_config, "backend", backend):
                said = refusals.config_refusals(config, measured)
                found[f"heads, {backend}"] = [str(each) for each in said]
        config.additional_config["spindle"] = measured.model_dump()
        found["reserved for heads"] = reserved_bytes(config)
        lines.clear()
        config.parallel_config.worker_cls = platforms.CUDA.stock_worker
        config.scheduler_config.scheduler_cls = None
        config.additional_config["spindle"] = dict(ON)
        found["prepared"] = startup.prepare(config)
        found["worker"] = config.parallel_config.worker_cls
        found["reserved"] = reserved_bytes(config)
        found["lines"], lines[:] = list(lines), []
        found |= _profiled(config, lines)
    return {**found, **_classes(config, layers, platform)}


def _profiled(config: Any, lines: list[list[str]]) -> dict[str, Any]:
    """Lines of a start with a profile beside the model, and with one among the options."""
    import json
    from pathlib import Path
    from tempfile import TemporaryDirectory
    from unittest.mock import patch

    from vllm_spindle.engine import platforms, startup

    found: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        profile = json.dumps({"head_shares": HEAD_SHARES, "num_bands": 3})
        Path(folder, "spindle-profile.json").write_text(profile)
        for name, options in (
            ("file", ON),
            ("option", ON | {"head_shares": HEAD_SHARES}),
            ("uniform", ON | {"budget": "uniform"}),
        ):
            config.parallel_config.worker_cls = platforms.CUDA.stock_worker
            config.scheduler_config.scheduler_cls = None
            config.additional_config["spindle"] = dict(options)
            lines.clear()
            with patch.object(config.model_config, "model", folder):
                startup.prepare(config)
            warnings = [text for level, text in lines if level == "WARNING"]
            found[f"profile {name}"] = [text.replace(folder, "MODEL") for text in warnings]
            found[f"budget {name}"] = config.additional_config["spindle"]["budget"]
    return found


def _classes(config: Any, layers: Any, platform: Any) -> dict[str, Any]:
    from importlib import import_module

    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
    from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    from vllm_spindle.engine.platforms import CUDA

    found: dict[str, Any] = {}
    with platform("cuda"), set_current_vllm_config(config):
        for stock in (FlashAttentionBackend, TritonAttentionBackend):
            ours = layers.spindle_backend(stock)
            pairs = (
                (ours, stock),
                (ours.get_impl_cls(), stock.get_impl_cls()),
                (ours.get_builder_cls(), stock.get_builder_cls()),
            )
            assert all(issubclass(mine, theirs) and mine is not theirs for mine, theirs in pairs)
            found[ours.get_name()] = ours.__name__
            found[f"{ours.get_name()}, fused"] = [
                impl.fused_output_quant_supported(impl, kFp8StaticTensorSym)
                for impl in (stock.get_impl_cls(), ours.get_impl_cls())
            ]
        try:
            layers.spindle_backend(FlexAttentionBackend)
        except ValueError as error:
            found["chosen by vLLM"] = str(error)
    module, _, name = CUDA.worker.rpartition(".")
    worker = getattr(import_module(module), name)
    found["available"] = {name: _available(worker, config, *given) for name, given in GIVEN.items()}
    module, _, name = CUDA.stock_worker.rpartition(".")
    found["is subclass"] = issubclass(worker, getattr(import_module(module), name))
    return found


# name: KV cache bytes that the user gives, and that vLLM's plan of an earlier start writes there
GIVEN = {"by nobody": (None, None), "by the user": (7 << 30, None), "by a plan": (None, 7 << 30)}


def _available(worker: Any, config: Any, given: int | None, planned: int | None) -> int:
    """What our worker makes of 7 GiB for the KV cache."""
    from unittest.mock import patch

    from vllm.v1.worker.gpu_worker import Worker

    def stock(self: Any) -> int:
        self.cache_config.kv_cache_memory_bytes = given or planned
        return 7 << 30

    made = worker.__new__(worker)
    made.vllm_config, made.cache_config, made._reduction = config, config.cache_config, None
    with (
        patch.object(Worker, "determine_available_memory", stock),
        patch.object(config.cache_config, "kv_cache_memory_bytes", given),
    ):
        return made.determine_available_memory()


@pytest.fixture(scope="module")
def found(llama: str) -> dict[str, Any]:
    return in_child(configure, model=llama)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cuda_cannot_serve_is_refused(found: dict[str, Any], case: str) -> None:
    """One line by name, with the way out."""
    (message,) = found[case]
    place = 0
    for part in ["spindle does not support", *REFUSED[case][-1]]:
        assert part in message[place:], message
        place = message.index(part, place)


def test_cuda_starts_our_worker_and_says_what_was_not_seen(found: dict[str, Any]) -> None:
    """Nothing is refused; one warning."""
    assert found["good"] == found["float16 codebooks"] == []
    assert found["prepared"] and found["is subclass"]
    assert found["worker"] == "vllm_spindle.processes.worker_cuda.SpindleGPUWorker"
    (warning,) = [text for level, text in found["lines"] if level == "WARNING"]
    assert "not yet run on a GPU by us" in warning


@pytest.mark.parametrize("where", ["file", "option"])
def test_a_profile_is_used_by_vllms_own_choice_of_attention(
    found: dict[str, Any], where: str
) -> None:
    """Without a warning more than CUDA's own; whether its kernel can is asked at start-up."""
    assert len(found[f"profile {where}"]) == len(found["profile uniform"]) == 1
    assert found[f"budget {where}"] == "measured" != found["budget uniform"]


def test_measured_budgets_are_refused_by_no_backends_name(found: dict[str, Any]) -> None:
    """Of those that we derive from; their tables take memory, too."""
    assert [said for name, said in found.items() if name.startswith("heads, ")] == [[]] * 3
    assert found["reserved"] < found["reserved for heads"] < 2 << 30


def test_the_backend_asked_for_is_the_one_we_derive_from(found: dict[str, Any]) -> None:
    """Its name stays; another that vLLM might choose by itself is refused by name."""
    assert found["FLASH_ATTN"] == "SpindleFlashAttentionBackend"
    assert found["TRITON_ATTN"] == "SpindleTritonAttentionBackend"
    assert "--attention-backend=FLEX_ATTENTION" in found["chosen by vLLM"]


def test_outputs_are_quantised_behind_attention(found: dict[str, Any]) -> None:
    """Not within it: our kernel over codebooks writes them as they are."""
    assert found["TRITON_ATTN, fused"] == [True, False]
    assert found["FLASH_ATTN, fused"] == [False, False]


def test_other_platforms_are_refused(found: dict[str, Any]) -> None:
    """By name."""
    (message,) = found["rocm"]
    assert "platform=rocm" in message and "CPU and CUDA" in message


def test_memory_is_set_aside(found: dict[str, Any]) -> None:
    """For the tiny model some megabytes; not nothing, not gigabytes."""
    assert 1 << 20 < found["reserved"] < 2 << 30


def test_it_is_set_aside_unless_the_user_gives_a_size(found: dict[str, Any]) -> None:
    """A size that vLLM planned at an earlier start knows nothing of us."""
    available = found["available"]
    assert available["by the user"] == 7 << 30
    assert available["by nobody"] == available["by a plan"] == (7 << 30) - found["reserved"]


def on_device() -> dict[str, Any]:
    """Devices of what a step hands out, and what mixing devices or looking at one would say."""
    import torch
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_spindle.engine.region_rows import RegionRows
    from vllm_spindle.engine.shifted_table import ShiftedTable
    from vllm_spindle.engine.step import BandRows, CodebookRows, WindowRows
    from vllm_spindle.engine.window import WindowStash

    there: Any = {"device": "meta"}
    found: dict[str, Any] = {}
    for mistake in ("mixed", "looked at"):
        x = torch.zeros(4, **there)
        try:
            x + torch.zeros(4) if mistake == "mixed" else int(x.sum())
        except RuntimeError as error:
            found[mistake] = str(error)
    common = CommonAttentionMetadata(
        query_start_loc=torch.zeros(4, dtype=torch.int32, **there),
        query_start_loc_cpu=torch.arange(4, dtype=torch.int32),
        seq_lens=torch.zeros(3, dtype=torch.int32, **there),
        num_reqs=3,
        num_actual_tokens=3,
        max_query_len=1,
        max_seq_len=64,
        block_table_tensor=torch.zeros(3, 8, dtype=torch.int32, **there),
        slot_mapping=torch.zeros(3, dtype=torch.int64, **there),
    )
    shifted = ShiftedTable(0, 16, 4).shift(common, BandRows(*torch.tensor([[0, 1, 2, 4]] * 2).T))
    found["shifted"] = [shifted.block_table_tensor.device.type, shifted.seq_lens.device.type]
    found["shapes"] = [list(shifted.block_table_tensor.shape), list(shifted.seq_lens.shape)]
    codebooks = CodebookRows(
        rows=torch.tensor([1]),
        starts=torch.tensor([[1, 4]], dtype=torch.int32),
        prefix_blocks=torch.tensor([0], dtype=torch.int32),
        shapes=torch.tensor([[3, 4, 9]], dtype=torch.int32),
    )
    regions = RegionRows(16, 4, torch.device("meta"))
    for given in (regions.rows(common, None), regions.rows(common, codebooks)):
        found["regions"] = [
            getattr(given, name).device.type
            for name in ("block_table", "starts", "shapes", "tail_lens", "prefix_blocks")
        ]
    for num_tokens in (4, 40):
        stash = WindowStash(2, 4, 8, torch.bfloat16, "meta", staged_tokens=8)
        stash.expect(WindowRows(torch.tensor([0, 2, 3]), (("a", 1), ("b", 2))))
        for layer_idx in range(2):
            stash.record(layer_idx, torch.zeros(num_tokens, 4, 8, dtype=torch.bfloat16, **there))
        stash.settle()
        read = stash.read(1, "b")
        found[f"stash {num_tokens}"] = [read.device.type, list(read.shape)]
    return found | _split_by_head(common) | _reduced(there)


def _split_by_head(common: Any) -> dict[str, Any]:
    """Devices of a table with a row for each kv head, filled for a layer."""
    from itertools import product
    from unittest.mock import patch

    import torch

    from vllm_spindle.core.budget import BandPlan
    from vllm_spindle.engine.shared_head_table import SharedHeadTable
    from vllm_spindle.engine.step import HeadRows
    from vllm_spindle.kernels import device_head_pages

    plan = BandPlan(first_block=1, tail_block=3, prompt_blocks=4)
    rows = HeadRows.of([plan, None], lambda plan: [(3, 1)])
    launches, found = Launches(), []
    with patch.object(device_head_pages, "fill_head_pages", launches):
        for with_kernel in (False, True):
            size = 1, 2, 16, 4
            table = SharedHeadTable(*size, torch.device("meta"), with_kernel=with_kernel)
            for with_rest, given in product((False, True), (None, rows)):
                batch = table.batch(common, given, 32, with_rest=with_rest)
                batch.fill(0)
                split = batch.split
                for each in (split.block_table_tensor, split.seq_lens, split.query_start_loc):
                    found.append([each.device.type, len(each)])
    return {"heads": found, "filled": launches.devices}


class Launches:
    """In place of a kernel: keeps what it is launched with."""

    def __init__(self) -> None:
        self.devices: list[list[str]] = []

    def __getitem__(self, grid: Any) -> Any:
        assert all(isinstance(size, int) and size > 0 for size in grid)
        return self

    def __call__(self, *args: Any, **constants: Any) -> None:
        import torch

        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        assert len(tensors) + sum(isinstance(each, (int, float)) for each in args) == len(args)
        self.devices.append([each.device.type for each in tensors])


def _reduced(there: dict[str, Any]) -> dict[str, Any]:
    """A layer's reduction by eviction: what our kernels are launched with, and how often."""
    from contextlib import ExitStack
    from dataclasses import replace
    from unittest.mock import patch

    import torch

    from vllm_spindle.config import SpindleConfig, load_config
    from vllm_spindle.core.budget import BandPlan
    from vllm_spindle.core.choice import ChoiceRule
    from vllm_spindle.core.modality import VisualCap
    from vllm_spindle.engine.cache_layout import CacheLayout
    from vllm_spindle.engine.evicted_regions import DenseRegion, HeadRegion, evict
    from vllm_spindle.engine.layer_reduction import LayerReduction
    from vllm_spindle.engine.prompt_tokens import PagedTokens, ReducedLayer
    from vllm_spindle.kernels import device_compaction, device_scoring
    from vllm_spindle.policy import SERVERS, SpindlePolicy

    layout = CacheLayout.of(*torch.arange(2 * 16 * 16).view(16, 2, 16).unbind(1))
    cache = torch.zeros(9, 2, 16, 32, dtype=torch.bfloat16, **there)
    visual = VisualCap(torch.arange(75) % 3 == 0, 0.5)
    written: list[Any] = []
    layer = ReducedLayer(0, cache, 0.3, lambda *tensors: written.extend(tensors))
    launches = {
        (device_scoring, "log_sum_exps"): Launches(),
        (device_scoring, "merge_log_sum_exps"): Launches(),
        (device_scoring, "receive"): Launches(),
        (device_compaction, "gather_pages"): Launches(),
        (device_compaction, "write_pages"): Launches(),
    }
    with ExitStack() as stack:
        for (module, name), stub in launches.items():
            stack.enter_context(patch.object(module, name, stub))
        stack.enter_context(
            patch.object(device_scoring.DeviceAttention, "_choose_splits", lambda *_: 2)
        )
        for gqa in ("union", "mean"):
            config = SpindleConfig(keep_ratio=0.5, window=8, gqa=gqa)
            work = [
                LayerReduction(
                    layer,
                    # Two bands, which keep two blocks and one.
                    BandPlan(first_block=first, tail_block=4, prompt_blocks=5),
                    torch.zeros(4 - first, dtype=torch.int64, **there),
                    queries=torch.zeros(2, 3, 14, 16, dtype=torch.bfloat16, **there),
                    positions=torch.cat([torch.arange(40, 44), torch.arange(67, 77)]).to(**there),
                    tokens=PagedTokens(
                        layer, layout, torch.zeros(5, dtype=torch.int64, **there), 75
                    ),
                    rule=ChoiceRule(config.score, config.pool_kernel, gqa, window=8),
                    num_ahead=2,
                    visual=visual,
                )
                for first in (2, 3)
            ]
            region = DenseRegion(SpindlePolicy(config, 6, 16, 3))
            assert evict([region, region], work) == [32, 16]
        measured = load_config(
            {**MEASURED, "keep_ratio": 0.5, "num_bands": 6, "min_prompt_len": 32}
        )
        policy = SpindlePolicy(measured, 6, 16, 3)
        plan = policy.plan_request(75, SERVERS)[0]
        region = torch.zeros(plan.reduced_blocks, dtype=torch.int64, **there)
        work = [replace(each, plan=plan, region=region) for each in work]
        evict([HeadRegion(policy, range(2))] * 2, work)
    assert not written
    return {"launched": {name: stub.devices for (_, name), stub in launches.items()}}


def test_a_step_stays_on_the_device() -> None:
    """Tables, rows, queries, and a reduction by eviction: nothing is mixed or looked at."""
    found = in_child(on_device)
    assert "mixed" in found and "looked at" in found
    assert found["shifted"] == ["meta"] * 2
    assert found["shapes"] == [[3, 8], [3]]
    assert found["regions"] == ["meta"] * 5
    lens = [6, 6, 7] * 2 + [8, 8, 9] * 2
    assert found["heads"] == [["meta", length] for length in lens] * 2
    assert found["filled"] == [["meta"] * 8] * 4
    assert found["stash 4"] == found["stash 40"] == ["meta", [2, 4, 8]]
    tensors = {"log_sum_exps": 5, "merge_log_sum_exps": 2, "receive": 6}
    tensors |= {"gather_pages": 5, "write_pages": 3}
    for name, count in tensors.items():
        assert found["launched"][name] == [["meta"] * count] * 6
