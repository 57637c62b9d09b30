"""The proposed default: its parts, and the profile that is measured for it."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import oracles
import tiny
from vllm_spindle.baselines.base import PromptLayer
from vllm_spindle.baselines.profiled import Profiled, interpolate, profile_of
from vllm_spindle.calibration.profile import divergence, measure_profile, read
from vllm_spindle.core.scoring import received_attention, window_attention
from vllm_spindle.hf_layers import QueryCache, enable

NUM_LAYERS, KV_HEADS, GROUP, NUM_TOKENS, HEAD_SIZE = 3, 2, 2, 70, 8
CONTEXT = 52  # what is not in the blocks of a window of 16, at 4 tokens a block
DIALS: dict[str, Any] = {"window": 16, "block_size": 4}


@pytest.fixture(scope="module")
def layers() -> list[PromptLayer]:
    generator = torch.Generator().manual_seed(5)
    return [
        PromptLayer(
            queries=2 * torch.randn(KV_HEADS, GROUP, NUM_TOKENS, HEAD_SIZE, generator=generator),
            keys=torch.randn(KV_HEADS, NUM_TOKENS, HEAD_SIZE, generator=generator),
            values=torch.randn(KV_HEADS, NUM_TOKENS, HEAD_SIZE, generator=generator),
            scale=0.4,
            layer_idx=layer_idx,
        )
        for layer_idx in range(NUM_LAYERS)
    ]


def _counts(layers: list[PromptLayer], method: Profiled, byte_ratio: float) -> list[int]:
    """Tokens that a kv head keeps of each layer's context."""
    return [
        each.positions.shape[1] if each.num_context else CONTEXT
        for each in method.reduce(layers, byte_ratio)
    ]


def test_scores_are_the_most_that_was_received_from_afar(layers: list[PromptLayer]) -> None:
    """The top of the pooled maxima over queries and the group's heads, in whole blocks."""
    for layer, each in zip(
        layers, Profiled(window_turns=False, **DIALS).reduce(layers, 0.5), strict=True
    ):
        received = received_attention(
            layer.queries,
            layer.keys,
            0.4,
            positions=torch.arange(NUM_TOKENS),
            min_distance=16,
            reduction="max",
        )
        context = received[..., :CONTEXT].amax(dim=1)
        pooled = torch.stack(
            [context[:, max(0, t - 2) : t + 3].amax(dim=1) for t in range(CONTEXT)], dim=1
        )
        # Half of 70 tokens are 8.75 blocks, of which the tail takes 5.
        assert each.positions.shape[1] in (12, 16)
        for head, row in zip(each.positions, pooled, strict=True):
            assert torch.equal(row[head].sort().values, row.sort().values[-len(head) :])
            assert head.tolist() == sorted(set(head.tolist()))
        held = each.positions.shape[1] + 20
        assert each.num_bytes == KV_HEADS * held * 4 * HEAD_SIZE


@pytest.mark.parametrize("gqa", ["max", "mean", "union"])
def test_window_scores_are_for_ablation(layers: list[PromptLayer], gqa: Any) -> None:
    """Unpooled, by the last queries: the query heads' maximum, mean, or turns."""
    method = Profiled(score="window", pool_kernel=1, gqa=gqa, **DIALS)
    layer = layers[0]
    attention = window_attention(layer.queries[:, :, -16:], layer.keys, 0.4)[..., :CONTEXT]
    found = method.importance(layer, CONTEXT)
    if gqa == "union":
        for own, row in zip(attention, found, strict=True):
            best = {int(head.argmax()) for head in own}
            assert set(row.topk(len(best)).indices.tolist()) == best
    else:
        expected = attention.amax(1) if gqa == "max" else attention.mean(1)
        torch.testing.assert_close(found, expected)


def test_window_and_received_take_turns(layers: list[PromptLayer]) -> None:
    """Half of what is kept is the one score's best, half the other's, in turns."""
    dials: dict[str, Any] = {"pool_kernel": 1, **DIALS}
    first, second = (
        Profiled(score=score, window_turns=False, **dials).importance(layers[0], CONTEXT)
        for score in ("received", "window")
    )
    found = Profiled(**dials).importance(layers[0], CONTEXT)
    for head in range(KV_HEADS):
        rankings = [oracles.ranking(row.tolist()) for row in (first[head], second[head])]
        turns = [t for pair in zip(*rankings, strict=True) for t in pair]
        assert found[head].argsort(descending=True).tolist() == list(dict.fromkeys(turns))


def test_strides_leave_the_window_whole(layers: list[PromptLayer]) -> None:
    """Every fifth query of the prompt scores, and each of the last 16."""
    found = Profiled(stride=5, pool_kernel=1, min_distance=0, **DIALS)
    found = found.scores(layers[0], CONTEXT, "received")
    queries, first = layers[0].queries, NUM_TOKENS - 16
    expected = torch.zeros(KV_HEADS, GROUP, NUM_TOKENS)
    for t in [*range(0, first, 5), *range(first, NUM_TOKENS)]:
        row = received_attention(
            queries[:, :, t : t + 1], layers[0].keys, 0.4, positions=torch.tensor([t])
        )
        expected = torch.maximum(expected, row)
    torch.testing.assert_close(found, expected[..., :CONTEXT])


def test_a_prompt_may_be_read_twice(model: Any) -> None:
    """The second reading's queries score, and leave nothing else behind."""
    ids = torch.tensor([tiny.prompts(1, [64])[0]["prompt_token_ids"]])
    enable(model)
    once, twice = QueryCache(model.config), QueryCache(model.config)
    with torch.inference_mode():
        model(ids, past_key_values=once)
        model(ids, past_key_values=twice)
        model(ids, past_key_values=twice)
    method = Profiled(score="repeated", pool_kernel=1, **DIALS)
    assert method.reads_twice and not Profiled().reads_twice
    for first, second in zip(once.prompt(None), twice.prompt(None, 64), strict=True):
        assert twice.get_seq_length() == 64
        torch.testing.assert_close(first.keys, second.keys)
        torch.testing.assert_close(first.queries, second.queries)
        rows = torch.einsum("kgqd,ktd->kgqt", second.repeated, second.keys) * second.scale
        expected = rows.softmax(-1).amax(2)[..., :40]
        torch.testing.assert_close(method.scores(second, 40, "repeated"), expected)
        with pytest.raises(ValueError, match="read once only"):
            method.scores(first, 40, "repeated")


def test_a_profile_shares_out_the_same_bytes(layers: list[PromptLayer]) -> None:
    """Layers by their shares, all together as without a profile; what does not fit goes on."""
    alike = _counts(layers, Profiled(**DIALS), 0.6)
    assert max(alike) - min(alike) <= 4
    steep = _counts(layers, Profiled(profile={0.6: (0.35, 1.0, 0.45)}, **DIALS), 0.6)
    assert sum(steep) == sum(alike)
    assert steep[1] >= CONTEXT - 4 and 4 <= steep[0] < steep[2]
    # Everything to one layer: it is full, and the others get the rest, at least a block.
    one = _counts(layers, Profiled(profile={0.6: (0.0, 1.8, 0.0)}, **DIALS), 0.6)
    assert one[1] == CONTEXT and sum(one) == sum(alike)


@pytest.mark.parametrize("byte_ratio", [0.4, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("profile", [None, {0.5: (0.9, 0.4, 0.2)}])
def test_bytes_are_held(layers: list[PromptLayer], profile: Any, byte_ratio: float) -> None:
    """Never more than asked for, less by a block and the tail's padding at most."""
    found = sum(
        each.num_bytes for each in Profiled(profile=profile, **DIALS).reduce(layers, byte_ratio)
    )
    budget = Fraction(str(byte_ratio)) * sum(layer.full_bytes for layer in layers)
    assert budget - 4 * KV_HEADS * 4 * HEAD_SIZE * (1 + NUM_LAYERS) < found <= budget


def test_profiles_are_read_between_their_points() -> None:
    """On the line between two points, to all above, in proportion below."""
    profile = profile_of({"0.5": [0.8, 0.2], "0.25": [0.5, 0.0]})
    assert interpolate(profile, 2, 0.5) == [0.8, 0.2]
    assert interpolate(profile, 2, 0.375) == pytest.approx([0.65, 0.1])
    assert interpolate(profile, 2, 0.75) == pytest.approx([0.9, 0.6])
    assert interpolate(profile, 2, 0.125) == pytest.approx([0.25, 0.0])
    with pytest.raises(ValueError, match="a share for each of 3 layers"):
        interpolate(profile, 3, 0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of three layers the last one's attention comes to nothing."""
    folder = tiny.write_llama(tmp_path_factory.mktemp("llama"), num_layers=3, num_heads=4)
    loaded = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        loaded.model.layers[2].self_attn.o_proj.weight.zero_()
    return loaded


def test_a_profile_takes_from_what_does_not_matter(model: Any) -> None:
    """The layer whose outputs are zero gives up all it can before any other loses anything."""
    ids = tiny.prompts(1, [64])[0]["prompt_token_ids"]
    prompts = [(ids, []), (ids[:60], ids[60:])]
    method = Profiled(window=8)
    dials: dict[str, Any] = {"num_new": 3, "least_ratio": 0.3}
    profile = measure_profile(model, method, prompts, trust=1.0, **dials)
    for ratio, shares in measure_profile(model, method, prompts, trust=0.25, **dials).items():
        near = [0.25 * share + 0.75 * ratio for share in profile[ratio]]
        assert shares == pytest.approx(near, abs=1e-3)
    floor = pytest.approx(8 / 60, abs=1e-3)
    assert profile[0.7][:2] == (1.0, 1.0) or profile[0.7][2] == floor
    for ratio, shares in profile.items():
        assert sum(shares) / 3 == pytest.approx(ratio, abs=1e-3)
        assert shares[:2] == (1.0, 1.0) or shares[2] == floor
    assert min(profile) == pytest.approx(0.3, abs=0.051)
    asked = read(model, method, *prompts[0], 3)
    assert divergence(model, asked, (1.0, 1.0, 1.0)) == pytest.approx(0, abs=1e-6)
    assert divergence(model, asked, (1.0, 1.0, 0.2)) == pytest.approx(0, abs=1e-6)
    assert divergence(model, asked, (0.2, 1.0, 1.0)) > 1e-3


def test_bands_go_together(model: Any) -> None:
    """Layers of a band have one share."""
    ids = tiny.prompts(1, [64])[0]["prompt_token_ids"]
    profile = measure_profile(
        model,
        Profiled(window=8),
        [(ids, [])],
        num_new=2,
        least_ratio=0.5,
        trust=1.0,
        bands=[range(0, 2), range(2, 3)],
    )
    assert len(profile) >= 10
    assert all(shares[0] == shares[1] for shares in profile.values())
