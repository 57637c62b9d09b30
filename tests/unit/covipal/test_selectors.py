"""Each selector against its slow twin, and what only one of them promises."""

import pytest
import torch
from torch import Tensor

import oracles_selectors as oracles
from vllm_covipal.core.pruner import PruningModule, PruningModuleConfig
from vllm_covipal.core.visual_item import VisualItem
from vllm_covipal.selectors import SELECTOR_NAMES, build_selector, uses_text
from vllm_covipal.selectors import cosines as cosines_module
from vllm_covipal.selectors.base import unit_rows
from vllm_covipal.selectors.cdpruner import greedy_map, relevance
from vllm_covipal.selectors.cosines import Cosines
from vllm_covipal.selectors.divprune import farthest_points
from vllm_covipal.selectors.grid import grid_places, share_by_size, spread


def _rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_kept", [1, 2, 7, 23, 24])
def test_divprune_equals_loops(seed: int, num_kept: int) -> None:
    """Farthest points, in the same order, as all pairwise distances give."""
    rows = _rows(24, 6, seed=seed)
    expected = oracles.farthest_points(rows, num_kept)
    assert farthest_points(_unit(rows), num_kept).tolist() == expected


@pytest.mark.parametrize("name", SELECTOR_NAMES)
def test_no_value_is_read_and_no_device_mixed(name: str) -> None:
    """On torch's device "meta", which knows no values: on a GPU nothing waits for them."""
    module = PruningModule(PruningModuleConfig.for_hidden_size(48)).to("meta")
    selector = build_selector(name, pruning_module=module if name == "ppm" else None, seed=0)
    items = [
        VisualItem(
            visual=torch.empty(36, 48, device="meta"),
            text=torch.empty(num_text, 48, device="meta"),
            structure_mask=None,
            grids=((6, 6),),
            num_kept=9,
        )
        for num_text in (5, 0)
    ]
    with torch.inference_mode():
        chosen = selector.select(items)
        scores = module([item.visual for item in items], [item.text for item in items])
    assert [(index.device.type, len(index)) for index in chosen] == [("meta", 9)] * 2
    assert scores.shape == (72,)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_kept", [1, 2, 7, 15])
def test_cdpruner_equals_determinants(seed: int, num_kept: int) -> None:
    """Incremental Cholesky picks what computing every determinant picks."""
    rows, text = _rows(20, 24, seed=seed), _rows(5, 24, seed=100 + seed)
    quality = relevance(_unit(rows), text)
    expected = oracles.relevance(rows, text)
    assert quality.tolist() == pytest.approx(expected, abs=1e-5)
    picks = greedy_map(_unit(rows), quality, num_kept)
    assert picks.tolist() == oracles.greedy_determinant(rows, expected, num_kept)


def test_cdpruner_without_text_is_diversity_alone() -> None:
    """No text, no relevance: the plain determinant of the cosines decides."""
    rows = _rows(20, 24)
    quality = relevance(_unit(rows), torch.zeros(0, 24))
    assert quality.tolist() == [1.0] * 20
    expected = oracles.greedy_determinant(rows, [1.0] * 20, 7)
    assert greedy_map(_unit(rows), quality, 7).tolist() == expected


def test_cdpruner_beyond_the_rank_goes_by_relevance() -> None:
    """Three directions in twelve rows: after three picks the rest comes best first."""
    base = torch.eye(3)
    rows = base.repeat(4, 1)
    quality = torch.linspace(0.1, 1.2, 12)
    picks = greedy_map(rows, quality, 12)
    assert sorted(picks.tolist()) == list(range(12))
    assert picks.tolist() == list(range(11, -1, -1))


@pytest.mark.parametrize("name", ["divprune", "cdpruner"])
def test_rows_on_demand_choose_as_the_matrix_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture too large for a matrix of cosines gets the same choice."""
    item = VisualItem(_rows(300, 48), _rows(5, 48, seed=1), None, (), 40)
    whole = build_selector(name).select([item])[0]
    monkeypatch.setattr(cosines_module, "MAX_MATRIX_ROWS", 0)
    monkeypatch.setattr(cosines_module, "BLOCK_ROWS", 77)
    assert build_selector(name).select([item])[0].tolist() == whole.tolist()


def test_divprune_leaves_duplicates_for_last() -> None:
    """Copies of a row are worth nothing next to it; among equals the lower index goes first."""
    rows = torch.eye(4).repeat_interleave(3, dim=0)
    item = VisualItem(rows, torch.zeros(0, 4), None, (), 4)
    assert build_selector("divprune").select([item])[0].tolist() == [0, 3, 6, 9]


def test_ppm_keeps_the_top_scored() -> None:
    """The rows kept are the rows with the highest scores, lower index first among equals."""
    torch.manual_seed(0)
    module = PruningModule(PruningModuleConfig.for_hidden_size(64)).eval()
    visual = _rows(30, 64)
    visual[20] = visual[3]
    item = VisualItem(visual, _rows(4, 64, seed=1), None, (), 11)
    scores = module.score_items([visual], [item.text])[0].tolist()
    best = sorted(range(30), key=lambda place: (-scores[place], place))[:11]
    selector = build_selector("ppm", pruning_module=module)
    assert selector.select([item])[0].tolist() == sorted(best)


@pytest.mark.parametrize(("share", "num_spread"), [(0.0, 0), (0.1, 0), (0.3, 2), (0.99, 6)])
def test_ppm_spreads_a_share_over_the_others(share: float, num_spread: int) -> None:
    """Seven of twenty: the highest first; of the others, in the picture's order, every n-th."""
    torch.manual_seed(0)
    config = PruningModuleConfig(
        hidden_size=16, width=16, num_blocks=1, num_heads=2, spread_share=share
    )
    module = PruningModule(config).eval()
    item = VisualItem(torch.randn(20, 16), torch.randn(3, 16), None, (), 7)
    scores = module.score_items([item.visual], [item.text])[0].tolist()
    by_score = sorted(range(20), key=lambda place: -scores[place])
    top, others = by_score[: 7 - num_spread], sorted(by_score[7 - num_spread :])
    expected = sorted(top + [others[place] for place in spread(len(others), num_spread)])
    assert build_selector("ppm", pruning_module=module).select([item])[0].tolist() == expected


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_ppm_spreads_a_share_by_diversity(share: float) -> None:
    """The highest first; then, one by one, whatever is farthest from the span of all before."""
    torch.manual_seed(0)
    config = PruningModuleConfig(
        hidden_size=24, width=16, num_heads=2, spread_share=share, spread_by="diverse"
    )
    module = PruningModule(config).eval()
    item = VisualItem(torch.randn(20, 24), torch.randn(3, 24), None, (), 9)
    scores = module.score_items([item.visual], [item.text])[0].tolist()
    expected = sorted(range(20), key=lambda place: -scores[place])[: 9 - int(9 * share)]
    unit = _unit(item.visual).double()
    while len(expected) < 9:
        basis, _ = torch.linalg.qr(unit[expected].T)
        left = (unit - unit @ basis @ basis.T).norm(dim=-1)
        left[expected] = -1
        expected.append(int(left.argmax()))
    assert build_selector("ppm", pruning_module=module).select([item])[0].tolist() == sorted(
        expected
    )


def test_random_is_a_prefix_of_one_permutation() -> None:
    """More budget adds to a choice; another seed makes another one; global state is untouched."""
    visual = _rows(100, 4)
    state = torch.random.get_rng_state()
    small, large = (
        build_selector("random", seed=3).select([VisualItem(visual, visual[:0], None, (), k)])[0]
        for k in (10, 40)
    )
    other = build_selector("random", seed=4).select([VisualItem(visual, visual[:0], None, (), 10)])
    assert set(small.tolist()) < set(large.tolist())
    assert other[0].tolist() != small.tolist()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_random_is_uniform() -> None:
    """Over many seeds every row is kept about as often."""
    visual, kept = torch.zeros(20, 2), torch.zeros(20)
    for seed in range(800):
        item = VisualItem(visual, visual[:0], None, (), 5)
        kept[build_selector("random", seed=seed).select([item])[0]] += 1
    assert float(kept.min()) > 150 and float(kept.max()) < 250


def test_spread_takes_the_middles() -> None:
    """Two of eight places lie in the middle of each half."""
    assert spread(8, 2) == [2, 6]
    assert spread(9, 3) == [1, 4, 7]
    assert spread(5, 5) == [0, 1, 2, 3, 4]
    assert spread(5, 0) == []


def test_a_quarter_of_a_square_is_every_other_row_and_column() -> None:
    """24 x 24 at a quarter: 12 x 12, evenly."""
    places = grid_places(24, 24, 144)
    assert {place // 24 for place in places} == set(range(1, 24, 2))
    assert {place % 24 for place in places} == set(range(1, 24, 2))


def test_grid_follows_the_aspect() -> None:
    """Sixteen of a 4 x 16 strip: two lines of eight, two apart both ways."""
    expected = [16 * row + col for row in (1, 3) for col in range(1, 16, 2)]
    assert grid_places(4, 16, 16) == expected


def test_few_tokens_are_spread_over_many_frames() -> None:
    """Three of nine frames: not the first three."""
    assert share_by_size([4] * 9, 3) == [0, 1, 0, 0, 1, 0, 0, 1, 0]
    assert share_by_size([16, 64], 20) == [4, 16]


def test_grid_serves_every_crop_alike() -> None:
    """A base crop of 16 and a picture of 64, with newlines between, at a quarter."""
    lines = [torch.zeros(16, dtype=torch.bool)]
    lines += [torch.tensor([False] * 8 + [True])] * 8
    mask = torch.cat(lines)
    item = VisualItem(torch.zeros(88, 2), torch.zeros(0, 2), mask, ((4, 4), (8, 8)), 20)
    rows = build_selector("grid").select([item])[0]
    assert int((rows < 16).sum()) == 4
    assert int((~mask)[rows].sum()) == 20
    assert int(mask[rows].sum()) == 8


def test_only_the_text_aware_say_so() -> None:
    """What goes into cache keys hangs on it."""
    module = PruningModule(PruningModuleConfig.for_hidden_size(64))
    aware = {n for n in SELECTOR_NAMES if build_selector(n, pruning_module=module).uses_text}
    assert aware == {"ppm", "cdpruner"} == {n for n in SELECTOR_NAMES if uses_text(n)}
    assert {build_selector(n, pruning_module=module).name for n in SELECTOR_NAMES} == set(
        SELECTOR_NAMES
    )


def test_unknown_names_and_a_missing_module_are_refused() -> None:
    """The message says what there is."""
    with pytest.raises(ValueError, match="ppm, random, grid, divprune, cdpruner, got 'fastv'"):
        build_selector("fastv")
    with pytest.raises(ValueError, match="'ppm' needs a pruning module"):
        build_selector("ppm")


@pytest.mark.parametrize("name", SELECTOR_NAMES)
def test_the_default_dtype_does_not_matter(name: str) -> None:
    """vLLM sets bf16 as the default while it builds and profiles: float32 is what chooses."""
    torch.manual_seed(0)
    module = PruningModule(PruningModuleConfig.for_hidden_size(64)).eval()
    selector = build_selector(name, pruning_module=module)
    item = VisualItem(_rows(90, 64), _rows(7, 64, seed=1), None, ((9, 10),), 20)
    expected = selector.select([item])[0].tolist()
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.inference_mode():
            assert selector.select([item])[0].tolist() == expected
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 6, 7, 13, 100])
def test_the_matrix_of_cosines_is_every_pair(num_rows: int) -> None:
    """Half of it is computed and the other half copied: as if each pair had been."""
    generator = torch.Generator().manual_seed(0)
    unit = unit_rows(torch.randn(num_rows, 16, generator=generator))
    cosines = Cosines(unit)
    rows = torch.stack([cosines.row(torch.tensor([i])) for i in range(num_rows)])
    assert torch.allclose(rows, unit @ unit.T, atol=1e-6)
