"""Every baseline against plain loops, on prompts of a few dozen tokens."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

import oracles_baselines as oracles
from vllm_spindle.baselines import METHODS, make_method
from vllm_spindle.baselines.base import PromptLayer, ReducedLayer, share_tokens
from vllm_spindle.core.codebook_bytes import true_bytes
from vllm_spindle.core.rotary import rotate_keys

NUM_LAYERS, KV_HEADS, GROUP, HEAD_SIZE, NUM_TOKENS, NUM_FUTURE = 4, 2, 2, 8, 48, 20
SCALE = HEAD_SIZE**-0.5


def _angles() -> Tensor:
    """Of every position and pair. [T + future, D / 2]."""
    frequencies = 0.3 ** torch.arange(HEAD_SIZE // 2)
    return torch.arange(NUM_TOKENS + NUM_FUTURE)[:, None] * frequencies


@pytest.fixture(scope="module")
def layers() -> list[PromptLayer]:
    generator = torch.Generator().manual_seed(3)
    angles = _angles()
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
    positions = torch.arange(NUM_TOKENS)
    made = []
    for layer_idx in range(NUM_LAYERS):
        queries = 2 * torch.randn(KV_HEADS, GROUP, NUM_TOKENS, HEAD_SIZE, generator=generator)
        # Heads of different sharpness, for AdaKV; few different keys, for D2O and the paper.
        queries[1] *= 0.3
        kinds = torch.randn(KV_HEADS, 10, HEAD_SIZE, generator=generator)
        drawn = torch.randint(0, 10, (NUM_TOKENS,), generator=generator)
        noise = 0.15 * torch.randn(KV_HEADS, NUM_TOKENS, HEAD_SIZE, generator=generator)
        made.append(
            PromptLayer(
                queries=rotate_keys(queries, positions, cos_sin),
                keys=rotate_keys(kinds[:, drawn] + noise, positions, cos_sin),
                values=kinds.flip(1)[:, drawn] + noise.flip(1),
                scale=SCALE,
                layer_idx=layer_idx,
                cos_sin=cos_sin,
            )
        )
    return made


@pytest.fixture(scope="module")
def attention(layers: list[PromptLayer]) -> list[list[list[oracles.Matrix]]]:
    return [oracles.attention(layer.queries, layer.keys, SCALE) for layer in layers]


def _kept(reduced: ReducedLayer) -> list[list[int]]:
    """All prompt positions that each kv head still has."""
    tail = list(range(reduced.num_context, NUM_TOKENS))
    return [
        row[there].tolist() + tail
        for row, there in zip(reduced.positions, reduced.is_there, strict=True)
    ]


def _is_best(
    kept: list[list[int]], scores: oracles.Matrix, num_kept: list[int] | int, num_recent: int
) -> bool:
    """Whether heads keep the last tokens and the best of the context; equals are equal."""
    context = NUM_TOKENS - num_recent
    counts = [num_kept] * len(kept) if isinstance(num_kept, int) else num_kept
    for own, row, count in zip(kept, scores, counts, strict=True):
        chosen = own[:-num_recent]
        best = sorted(row[:context])[context - count + num_recent :]
        found = sorted(row[t] for t in set(chosen))
        if own[-num_recent:] != list(range(context, NUM_TOKENS)) or found != pytest.approx(best):
            return False
    return True


def test_random_keeps_the_window_and_draws_the_rest(layers: list[PromptLayer]) -> None:
    """Same seed, same draw; another seed, layer or head, another one; the window stays."""
    first, again = (make_method("random", seed=5, num_recent=8).reduce(layers, 0.5) for _ in "ab")
    other = make_method("random", seed=6, num_recent=8).reduce(layers, 0.5)
    draws = [_kept(each)[head] for each in first for head in range(KV_HEADS)]
    assert [_kept(a) for a in first] == [_kept(b) for b in again]
    assert [_kept(a) for a in first] != [_kept(b) for b in other]
    assert len({tuple(draw) for draw in draws}) == len(draws)
    assert all(draw[-8:] == list(range(40, 48)) and len(set(draw)) == 24 for draw in draws)


def test_streaming_llm_keeps_both_ends(layers: list[PromptLayer]) -> None:
    """Four sinks, and the last of the tokens as far as the budget goes."""
    expected = [0, 1, 2, 3, *range(NUM_TOKENS - 8, NUM_TOKENS)]
    for reduced in make_method("streaming_llm").reduce(layers, 0.25):
        assert _kept(reduced) == [expected] * KV_HEADS


def test_h2o_keeps_heavy_hitters(layers: list[PromptLayer], attention: list) -> None:
    """Half of the budget the last tokens, half the highest column sums."""
    for reduced, heads in zip(make_method("h2o").reduce(layers, 0.5), attention, strict=True):
        sums = oracles.group_mean(oracles.column_sums(heads))
        assert _is_best(_kept(reduced), sums, 24, 12)


@pytest.mark.parametrize(("pool", "kernel"), [("avg", 5), ("max", 7), ("avg", 1)])
def test_snapkv_keeps_what_the_window_sees(
    layers: list[PromptLayer], attention: list, pool: str, kernel: int
) -> None:
    """The window, and the top of its pooled attention."""
    method = make_method("snapkv", num_recent=8, pool=pool, pool_kernel=kernel)
    for reduced, heads in zip(method.reduce(layers, 0.5), attention, strict=True):
        assert _is_best(_kept(reduced), oracles.snapkv(heads, 8, kernel, pool), 24, 8)


@pytest.mark.parametrize("byte_ratio", [0.3, 0.5, 0.7])
def test_pyramidkv_keeps_less_the_deeper(
    layers: list[PromptLayer], attention: list, byte_ratio: float
) -> None:
    """Budgets in arithmetic progression, within a token; SnapKV's choice within each."""
    total = int(Fraction(str(byte_ratio)) * NUM_LAYERS * NUM_TOKENS)
    expected = oracles.pyramidkv_budgets(NUM_LAYERS, total, NUM_TOKENS, window=8, beta=20)
    reduced = make_method("pyramidkv").reduce(layers, byte_ratio)
    budgets = [len(_kept(each)[0]) for each in reduced]
    assert sum(budgets) == total
    assert all(abs(b - e) < 1 for b, e in zip(budgets, expected, strict=True))
    for each, heads, budget in zip(reduced, attention, budgets, strict=True):
        assert _is_best(_kept(each), oracles.snapkv(heads, 8, 7, "max"), budget, 8)


def test_pyramidinfer_narrows_layer_by_layer(layers: list[PromptLayer], attention: list) -> None:
    """Cosine steps that multiply; each layer's tokens among the last one's, first four always."""
    method = make_method("pyramidinfer")
    reduced = method.reduce(layers, 0.75)
    budgets = [len(_kept(each)[0]) for each in reduced]
    floor = min(
        (i / 2000 for i in range(2001)),
        key=lambda p: abs(sum(oracles.pyramidinfer_shares(p, NUM_LAYERS)) - 0.75 * NUM_LAYERS),
    )
    shares = oracles.pyramidinfer_shares(floor, NUM_LAYERS)
    assert sum(budgets) == 144
    assert all(abs(b - s * NUM_TOKENS) < 1.1 for b, s in zip(budgets, shares, strict=True))
    alive = list(range(NUM_TOKENS))
    for each, heads, budget in zip(reduced, attention, budgets, strict=True):
        scores = oracles.pyramidinfer_scores(heads, 0.2, 1.2)
        context = NUM_TOKENS - budget // 2
        candidates = [t for t in alive if t < context]
        order = sorted(candidates, key=lambda t: (t >= 4, -scores[t]))
        alive = sorted(order[: budget - budget // 2]) + list(range(context, NUM_TOKENS))
        assert _kept(each) == [alive] * KV_HEADS


def test_adakv_lets_heads_compete(layers: list[PromptLayer], attention: list) -> None:
    """Counts within a token of what each head is due; SnapKV's choice within; heads differ."""
    method = make_method("adakv", num_recent=8)
    differ = 0
    for reduced, heads in zip(method.reduce(layers, 0.5), attention, strict=True):
        scores = oracles.snapkv(heads, 8, 7, "max")
        kept = _kept(reduced)
        due = oracles.adakv_counts(scores, KV_HEADS * 16 - 1, 0.2)
        counts = [len(own) - 8 for own in kept]
        assert sum(counts) == KV_HEADS * 16 - 1
        assert all(abs(c - d) < 1 for c, d in zip(counts, due, strict=True))
        assert _is_best(kept, scores, [count + 8 for count in counts], 8)
        differ += counts[0] != counts[1]
        # Less than two heads alike would hold: a row pays for the lengths.
        assert reduced.num_bytes == (2 * 24 - 1) * 4 * HEAD_SIZE + 4 * KV_HEADS
    assert differ


def test_expected_attention_looks_ahead(layers: list[PromptLayer]) -> None:
    """The Gaussian's moments by turning every query to every future position."""
    angles = _angles().tolist()
    method = make_method("expected_attention", num_future=NUM_FUTURE)
    for layer, reduced in zip(layers, method.reduce(layers, 0.5), strict=True):
        scores = oracles.expected_attention(
            layer.queries, layer.keys, layer.values, angles, SCALE, skip=4
        )
        raised = [[9e9] * 4 + row[4:] for row in scores]
        assert _is_best(_kept(reduced), raised, 24, 1)
        found = method.score(layer)[:, 4:]
        torch.testing.assert_close(found, torch.tensor(scores)[:, 4:], rtol=1e-3, atol=1e-6)


def test_d2o_merges_what_it_evicts(layers: list[PromptLayer], attention: list) -> None:
    """Heavy hitters by layers' spread; kept rows are the loop's means, some moved."""
    reduced = make_method("d2o").reduce(layers, 0.5)
    budgets = [len(_kept(each)[0]) for each in reduced]
    sums = [oracles.column_sums(heads) for heads in attention]
    weights = oracles.d2o_layer_weights(sums, 96, NUM_TOKENS)
    due = [96 * weight / sum(weights) for weight in weights]
    assert all(abs(b - d) < 1 for b, d in zip(budgets, due, strict=True))
    assert sum(budgets) == 96
    for layer, each, own, budget in zip(layers, reduced, sums, budgets, strict=True):
        scores = [[9e9] * 4 + row[4:] for row in oracles.group_mean(own)]
        assert _is_best(_kept(each), scores, budget, budget // 2)
        moved = 0.0
        for head in range(KV_HEADS):
            keys, values = layer.keys[head].tolist(), layer.values[head].tolist()
            kept = each.positions[head].tolist()
            expected = oracles.d2o_fold(keys, values, kept, each.num_context)
            torch.testing.assert_close(each.keys[head], torch.tensor(expected[0]))
            torch.testing.assert_close(each.values[head], torch.tensor(expected[1]))
            moved = max(moved, float((each.keys[head] - layer.keys[head, kept]).abs().max()))
        assert moved > 0.05


def test_the_paper_fills_its_bytes_with_copies(layers: list[PromptLayer], attention: list) -> None:
    """Every query head's own best by eq. 2, within the thresholds of what they were."""
    method = make_method("paper", window=8, theta_key=0.9, theta_value=0.8)
    full = sum(layer.full_bytes for layer in layers)
    reduced = method.reduce(layers, 0.6)
    assert 0.45 * full < sum(each.num_bytes for each in reduced) <= 0.6 * full
    counts = [each.positions.shape[1] for each in reduced]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    for layer, each, heads in zip(layers, reduced, attention, strict=True):
        copies = [head for own in heads for head in own]
        assert each.num_context == 40
        for row, head in enumerate(copies):
            scores = [sum(q[t] for q in head[40:]) / (NUM_TOKENS - t) for t in range(40)]
            assert each.positions[row].tolist() == oracles.top(scores, each.positions.shape[1])
        own = torch.arange(KV_HEADS).repeat_interleave(GROUP)[:, None]
        for found, stock, theta in ((each.keys, layer.keys, 0.9), (each.values, layer.values, 0.8)):
            stock = stock[own, each.positions]
            assert torch.cosine_similarity(found, stock, dim=-1).min() > theta - 0.01
            torch.testing.assert_close(found.norm(dim=-1), stock.norm(dim=-1), rtol=5e-3, atol=0)


def test_the_papers_bytes_count_everything(layers: list[PromptLayer]) -> None:
    """Entries, codes, norms and positions of every copy, and the dense window."""
    method = make_method("paper", window=8, theta_key=0.9999, theta_value=0.9999)
    for each in method.reduce(layers, 0.9):
        kept = each.positions.numel()
        # So near 1 only copies merge: an entry per token that any head keeps.
        entries = sum(len(own.unique()) for own in each.positions.view(KV_HEADS, -1))
        counted = true_bytes(
            num_kept=kept,
            num_key_entries=entries,
            num_value_entries=entries,
            head_size=HEAD_SIZE,
        )
        assert each.num_bytes == counted + KV_HEADS * 8 * 4 * HEAD_SIZE


def test_spindle_keeps_what_the_core_chooses(layers: list[PromptLayer]) -> None:
    """The engine's plan in blocks, the core's choice, padding counted."""
    from vllm_spindle.config import SpindleConfig
    from vllm_spindle.core.choice import ChoiceRule, choose_kept
    from vllm_spindle.policy import SpindlePolicy

    dials = {"window": 8, "recent": 8, "min_prompt_len": 0, "num_bands": 2}
    policy = SpindlePolicy(SpindleConfig(**dials), NUM_LAYERS, 4, GROUP)
    plans = policy.plan(NUM_TOKENS, 0.5)
    reduced = make_method("spindle", block_size=4, **dials).reduce(layers, 0.5)
    for layer, each in zip(layers, reduced, strict=True):
        plan = plans[policy.band_of_layer(layer.layer_idx)]
        observed = torch.from_numpy(policy.observed(NUM_TOKENS, [plan]))
        kept = choose_kept(
            ChoiceRule("received", 5, "union", window=8),
            layer.queries[:, :, observed],
            layer.keys,
            observed,
            scale=SCALE,
            num_context=plan.tail_block * 4,
            num_kept=plan.reduced_blocks * 4,
        )
        assert torch.equal(each.positions, kept)
        assert each.num_bytes == plan.held_blocks * 4 * KV_HEADS * 4 * HEAD_SIZE


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("full", "paper")])
def test_kept_rows_are_the_prompts(layers: list[PromptLayer], method: str) -> None:
    """What is said to be there is the prompt's row at its position, unless it took others in."""
    dials = {"min_prompt_len": 0, "window": 8} if method == "spindle" else {}
    for layer, each in zip(layers, make_method(method, **dials).reduce(layers, 0.5), strict=True):
        rows = torch.arange(KV_HEADS)[:, None].expand_as(each.positions)[each.is_there]
        places = each.positions[each.is_there]
        same = torch.isclose(each.keys[each.is_there], layer.keys[rows, places]).all(-1)
        assert bool(same.all()) == (method != "d2o")
        assert each.num_context < NUM_TOKENS
        assert (each.positions < each.num_context)[each.is_there].all()


def test_shares_are_filled_up() -> None:
    """What one layer cannot hold goes to the others by weight; none falls below a token."""
    assert share_tokens([Fraction(3), Fraction(1), Fraction(0)], 12, 6) == [6, 5, 1]
    assert share_tokens([Fraction(1)] * 3, 10, 6) == [4, 3, 3]
    assert share_tokens([Fraction(9), Fraction(1), Fraction(1)], 16, 6) == [6, 5, 5]
    with pytest.raises(ValueError, match="cannot share 19"):
        share_tokens([Fraction(1)] * 3, 19, 6)


def test_what_has_no_plain_rotation_is_refused(layers: list[PromptLayer]) -> None:
    """Methods that turn queries or keys back say so."""
    plain = [replace(layer, cos_sin=None) for layer in layers]
    for method in ("expected_attention", "paper"):
        with pytest.raises(ValueError, match="plain rotation"):
            make_method(method).reduce(plain, 0.75)
