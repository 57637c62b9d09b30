"""The GPU's scoring kernels, run by Triton's interpreter, against the torch functions of the core.

The interpreter is chosen when triton is imported, for the whole process: a child it is, one for
all cases. Shapes: K kv heads, G query heads per kv head, Q queries, T tokens, D head size. Unused
slots and blocks of the cache, and all values, hold NaN: whoever reads one shows it.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_child import in_child
from vllm_spindle.core.choice import ChoiceRule, rank_context
from vllm_spindle.core.modality import VisualCap
from vllm_spindle.core.scoring import Questions, answer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

TOLERANCE = 2e-6  # of probabilities and of their sums over the window; float32 throughout


@dataclass(frozen=True)
class Case:
    """One prompt. ``spread`` queries before a window of ``window``, ``ahead`` behind the prompt."""

    num_tokens: int
    spread: int = 20
    window: int = 8
    ahead: int = 0
    dtype: torch.dtype = torch.bfloat16
    head_size: int = 32
    group: int = 2
    num_kv_heads: int = 2
    block_size: int = 16
    num_splits: int = 1
    slots_outermost: bool = False
    is_paged: bool = True


CASES = {
    "short": Case(45),
    "one token": Case(1, spread=0, window=1),
    "window only": Case(77, spread=0),
    "a window that is the prompt": Case(24, spread=0, window=24),
    "whole blocks": Case(256),
    "ragged, three splits": Case(301, num_splits=3),
    "more splits than tiles": Case(130, num_splits=5),
    "many queries": Case(420, spread=150, window=32, num_splits=2),
    "every token asks": Case(140, spread=132, num_kv_heads=1, group=1),
    "ahead, group of 5": Case(203, ahead=5, group=5, num_splits=2),
    "slots outermost": Case(150, slots_outermost=True, num_splits=2),
    "blocks of 48": Case(150, block_size=48),
    "float16": Case(150, dtype=torch.float16),
    "float32": Case(150, dtype=torch.float32, num_splits=2),
    "head size 64, one query head": Case(150, head_size=64, group=1),
    "head size 96, group of 7": Case(150, head_size=96, group=7),
    "head size 128": Case(290, head_size=128, num_splits=2),
    "head size 256": Case(150, head_size=256, num_kv_heads=1, num_splits=2),
    "head size 256, float32": Case(90, head_size=256, dtype=torch.float32, num_kv_heads=1),
    "tensors": Case(170, is_paged=False, num_splits=2),
}


@dataclass
class Prompt:
    """A case's tensors."""

    queries: Tensor
    positions: Tensor
    keys: Tensor
    kv_cache: Tensor
    block_ids: Tensor
    scale: float


def make_prompt(case: Case) -> Prompt:
    """Keys in scattered blocks; queries as the stash has them, query by query."""
    torch.manual_seed(case.num_tokens)
    heads, d, n = case.num_kv_heads, case.head_size, case.block_size
    first_window = case.num_tokens - case.window
    positions = torch.cat(
        [
            torch.randperm(first_window)[: case.spread].sort().values,
            torch.arange(first_window, case.num_tokens + case.ahead),
        ]
    )
    # Wide, so that peaks move between tiles.
    queries = (2 * torch.randn(len(positions), heads * case.group, d)).to(case.dtype)
    keys = torch.randn(heads, case.num_tokens, d).to(case.dtype)
    num_blocks = -(-case.num_tokens // n)
    shape = (num_blocks + 3, n, heads) if case.slots_outermost else (num_blocks + 3, heads, n)
    kv_cache = torch.full((*shape, 2 * d), torch.nan).to(case.dtype)
    if case.slots_outermost:
        kv_cache = kv_cache.transpose(1, 2)
    block_ids = torch.randperm(num_blocks + 3)[:num_blocks]
    slots = torch.arange(case.num_tokens)
    kv_cache[block_ids[slots // n], :, slots % n, :d] = keys.transpose(0, 1)
    queries = queries.view(len(positions), heads, case.group, d).permute(1, 2, 0, 3)
    return Prompt(queries, positions, keys, kv_cache, block_ids, d**-0.5)


def attend(case: Case, prompt: Prompt, device: str = "cpu") -> Any:
    """The kernels' first pass."""
    from vllm_spindle.kernels.device_scoring import DeviceAttention, PagedKeys

    keys = prompt.keys.to(device)
    if case.is_paged:
        cache, blocks = prompt.kv_cache.to(device), prompt.block_ids.to(device)
        keys = PagedKeys(cache, blocks, case.num_tokens)
    queries, positions = prompt.queries.to(device), prompt.positions.to(device)
    return DeviceAttention(queries, keys, positions, prompt.scale, num_splits=case.num_splits)


def case_errors(device: str = "cpu") -> dict[str, dict[str, float]]:
    """Largest errors of each case, by what was asked."""
    found: dict[str, dict[str, float]] = {}
    for name, case in CASES.items():
        prompt = make_prompt(case)
        attention = attend(case, prompt, device)
        asking, num_queries = case.spread + case.window, len(prompt.positions)
        window = range(case.spread, asking)
        errors = found[name] = {}
        for what, last_first, from_afar in (
            ("window", None, False),
            ("window, from afar", None, True),
            ("last, window", asking - 1, False),
            ("all", asking - 1, True),
            ("ahead alone, window, from afar", asking if case.ahead else None, True),
            ("the whole window twice", case.spread, False),
        ):
            questions = Questions(window, last_first, from_afar)
            ours = attention.answer(questions)
            theirs = answer(prompt.queries, prompt.keys, prompt.positions, prompt.scale, questions)
            assert [each.shape for each in ours] == [each.shape for each in theirs]
            assert len(ours) == questions.num_maps
            errors[what] = max(
                float((mine.cpu() - other).abs().max())
                for mine, other in zip(ours, theirs, strict=True)
            )
        assert num_queries == asking + case.ahead
    return found


RULES = {
    "received": ChoiceRule("received", 5, "union", window=8),
    "window's sum alone": ChoiceRule("received", 5, "union", window=8, last_query=False),
    "pooled": ChoiceRule("pooled", 3, "mean", window=8),
    "paper": ChoiceRule("paper", 1, "unfold", window=8),
    "random": ChoiceRule("random", 1, "union", window=8, seed=3),
}


def same_choices() -> dict[str, list[bool]]:
    """Per rule, without and with what was decoded ahead: whether torch ranks tokens alike."""
    from vllm_spindle.kernels.device_scoring import PagedKeys

    found: dict[str, list[bool]] = {}
    for name, rule in RULES.items():
        for ahead in (0, 4):
            case = Case(203, ahead=ahead, dtype=torch.float32)
            prompt = make_prompt(case)
            keys = PagedKeys(prompt.kv_cache, prompt.block_ids, case.num_tokens)
            for visual in (None, VisualCap(torch.arange(203) % 3 == 0, 0.5)):
                counts = {
                    "scale": prompt.scale,
                    "num_context": 176,
                    "num_kept": 60,
                    "num_protected": 32,
                    "num_ahead": ahead,
                    "visual": visual,
                }
                ours, theirs = (
                    rank_context(rule, prompt.queries, each, prompt.positions, **counts)
                    for each in (keys, prompt.keys)
                )
                found.setdefault(name, []).append(torch.equal(ours, theirs))
    return found


def refusals() -> list[str]:
    """Messages about queries, keys, positions and tables that do not fit."""
    from vllm_spindle.kernels.device_scoring import DeviceAttention, PagedKeys

    prompt = make_prompt(Case(45))
    queries, positions, scale = prompt.queries, prompt.positions, prompt.scale
    paged = PagedKeys(prompt.kv_cache, prompt.block_ids, 45)
    attempts = [
        (queries.half(), paged, positions, scale),
        (queries[:1], paged, positions, scale),
        (queries, prompt.keys[..., :16], positions, scale),
        (queries, paged, positions[1:], scale),
        (queries, PagedKeys(prompt.kv_cache, prompt.block_ids, 49), positions, scale),
        (queries, paged, positions, -1.0),
        (queries.transpose(2, 3).contiguous().transpose(2, 3), paged, positions, scale),
    ]
    messages = []
    for attempt in attempts:
        with pytest.raises(ValueError) as refusal:
            DeviceAttention(*attempt)
        messages.append(str(refusal.value))
    return messages


def interpret() -> dict[str, Any]:
    """Everything that the tests look at, in the child."""
    torch.set_num_threads(1)
    return {function.__name__: function() for function in (case_errors, same_choices, refusals)}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What the interpreter found."""
    return in_child(interpret, env={"TRITON_INTERPRET": "1"}, imports_vllm_itself=True)


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_core(interpreted: dict[str, Any], name: str) -> None:
    """Sums and maxima, all that are asked at once, are torch's up to float32 error; no NaN."""
    for what, error in interpreted["case_errors"][name].items():
        assert error < TOLERANCE, what


@pytest.mark.parametrize("name", RULES)
def test_a_rule_ranks_alike(interpreted: dict[str, Any], name: str) -> None:
    """Behind a protected prefix; without and with queries ahead, without and with a visual cap."""
    assert interpreted["same_choices"][name] == [True] * 4


def test_what_does_not_fit_is_refused_by_value(interpreted: dict[str, Any]) -> None:
    """Each refusal names what it got."""
    named = [
        "torch.float16", "(1, 2, 28, 32)", "(2, 45, 16)", "27 positions", "49 tokens in 3 blocks",
        "scale -1.0", "contiguous",
    ]  # fmt: skip
    for part, message in zip(named, interpreted["refusals"], strict=True):
        assert part in message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_the_device_equal_the_core() -> None:
    """The same cases on the GPU, up to the order of float32 sums."""
    for errors in in_child(case_errors, device="cuda").values():
        assert max(errors.values()) < 1e-4
