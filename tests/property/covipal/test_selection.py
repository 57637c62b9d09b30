"""What holds for every choice of visual tokens, by every selector."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_covipal.core.budget import kept_rows, kept_tokens
from vllm_covipal.core.pruner import PruningModule, PruningModuleConfig
from vllm_covipal.core.visual_item import VisualItem
from vllm_covipal.selectors import SELECTOR_NAMES, Selector, build_selector

WIDTH = 16
RATIOS = st.sampled_from([0.05, 0.1, 0.25, 0.5, 1.0]) | st.floats(0.001, 1)


def _module() -> PruningModule:
    torch.manual_seed(0)
    config = PruningModuleConfig(hidden_size=WIDTH, width=16, num_blocks=2, num_heads=2)
    return PruningModule(config).eval()


MODULE = _module()


def _selector(name: str) -> Selector:
    return build_selector(name, pruning_module=MODULE)


@st.composite
def items(draw: st.DrawFn, min_text: int = 0) -> VisualItem:
    """One or two crops with or without newlines, duplicate rows now and then, T from 0."""
    grids = draw(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=2))
    num_candidates = sum(rows * cols for rows, cols in grids)
    mask = None
    if draw(st.booleans()):
        mask = torch.zeros(num_candidates + draw(st.integers(0, 5)), dtype=torch.bool)
        places = draw(st.permutations(range(len(mask))))
        mask[places[: len(mask) - num_candidates]] = True
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    visual = torch.randn(num_candidates if mask is None else len(mask), WIDTH, generator=generator)
    if draw(st.booleans()):
        visual = visual[torch.randint(0, len(visual), (len(visual),), generator=generator)]
    text = torch.randn(draw(st.integers(min_text, 6)), WIDTH, generator=generator)
    num_kept = kept_tokens(num_candidates, draw(RATIOS))
    return VisualItem(visual, text, mask, tuple(grids) if draw(st.booleans()) else (), num_kept)


@pytest.mark.parametrize("name", SELECTOR_NAMES)
@given(item=items())
def test_the_count_is_exact_and_the_rows_ascend(name: str, item: VisualItem) -> None:
    """Structure plus num_kept distinct rows of the item, in order, int64, structure included."""
    (rows,) = _selector(name).select([item])
    num_structure = 0 if item.structure_mask is None else int(item.structure_mask.sum())
    assert rows.shape == (num_structure + item.num_kept,)
    assert rows.dtype == torch.int64
    assert bool((rows[1:] > rows[:-1]).all())
    assert int(rows[0]) >= 0 and int(rows[-1]) < item.visual.shape[0]
    if item.structure_mask is not None:
        assert set(item.structure_mask.nonzero().flatten().tolist()) <= set(rows.tolist())


@pytest.mark.parametrize("name", SELECTOR_NAMES)
@given(item=items())
def test_ratio_one_keeps_everything(name: str, item: VisualItem) -> None:
    """Nothing to choose: every row, whatever the method."""
    (rows,) = _selector(name).select([replace(item, num_kept=item.num_candidates)])
    assert rows.tolist() == list(range(item.visual.shape[0]))


@pytest.mark.parametrize("name", SELECTOR_NAMES)
@given(batch=st.lists(items(), min_size=2, max_size=4))
@settings(max_examples=50)
def test_batch_mates_do_not_matter(name: str, batch: list[VisualItem]) -> None:
    """Alone, together and in another order: the same rows."""
    selector = _selector(name)
    together = [rows.tolist() for rows in selector.select(batch)]
    alone = [selector.select([item])[0].tolist() for item in batch]
    backwards = [rows.tolist() for rows in selector.select(batch[::-1])]
    assert together == alone == backwards[::-1]


@pytest.mark.parametrize("name", SELECTOR_NAMES)
@given(item=items())
@settings(max_examples=50)
def test_the_carrier_type_does_not_matter(name: str, item: VisualItem) -> None:
    """bf16 rows and the same values in float32 give the same choice, and leave no trace."""
    half = replace(item, visual=item.visual.bfloat16(), text=item.text.bfloat16())
    full = replace(half, visual=half.visual.float(), text=half.text.float())
    before = half.visual.clone()
    state = torch.random.get_rng_state()
    chosen = [rows.tolist() for rows in _selector(name).select([half, full])]
    assert chosen[0] == chosen[1]
    assert torch.equal(half.visual, before)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["random", "grid", "divprune"])
@given(item=items())
@settings(max_examples=50)
def test_the_text_blind_are_blind(name: str, item: VisualItem) -> None:
    """Any other text, the same rows."""
    other = replace(item, text=torch.ones(3, WIDTH))
    first, second = _selector(name).select([item, other])
    assert first.tolist() == second.tolist()


@given(item=items(min_text=1))
def test_the_text_moves_the_scores_of_the_pruning_module(item: VisualItem) -> None:
    """Another text, other scores."""
    visual = [item.candidates()] * 2
    first, second = MODULE.score_items(visual, [item.text, item.text.flip(1) + 1])
    assert not torch.equal(first, second)


@given(item=items(min_text=1))
def test_the_pruning_module_scores_an_item_alone_as_in_a_batch(item: VisualItem) -> None:
    """To the bit where it chooses, up to rounding where it learns."""
    visual, text = item.candidates(), item.text
    mates = [torch.ones(5, WIDTH), visual, torch.zeros(2, WIDTH)]
    texts = [text[:0], text, torch.ones(7, WIDTH)]
    (alone,) = MODULE.score_items([visual], [text])
    assert torch.equal(MODULE.score_items(mates, texts)[1], alone)
    packed = MODULE(mates, texts)[5 : 5 + len(visual)]
    assert torch.allclose(packed, alone, atol=1e-5)


def test_the_text_moves_the_choice_of_the_text_aware() -> None:
    """Ask for one row or for another: each is kept when it is asked for, by CDPruner."""
    generator = torch.Generator().manual_seed(0)
    visual = torch.randn(40, WIDTH, generator=generator)
    for asked in (3, 17, 30):
        item = VisualItem(visual, visual[asked : asked + 1], None, (), 5)
        assert asked in _selector("cdpruner").select([item])[0].tolist()
    texts = [torch.randn(4, WIDTH, generator=generator) for _ in range(6)]
    chosen = _selector("ppm").select([VisualItem(visual, text, None, (), 10) for text in texts])
    assert len({tuple(rows.tolist()) for rows in chosen}) > 1


@given(st.integers(0, 5000), RATIOS, RATIOS)
def test_more_ratio_never_keeps_less(num_candidates: int, one: float, other: float) -> None:
    """The count grows with the ratio, lies within a token of the product, and is whole at one."""
    low, high = sorted((one, other))
    kept = kept_tokens(num_candidates, low)
    assert kept <= kept_tokens(num_candidates, high) <= num_candidates
    assert kept_tokens(num_candidates, 1.0) == num_candidates
    assert low * num_candidates - 1e-6 <= kept < low * num_candidates + 1 + 1e-6
    assert (kept >= 1) == (num_candidates >= 1)
    assert kept_rows(num_candidates + 7, 7, low) == 7 + kept
