"""A cap on visual tokens: never more of them, never fewer tokens, order untouched otherwise."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_spindle.core.choice import ChoiceRule, choose_kept, rank_context
from vllm_spindle.core.modality import VisualCap, cap_visual, max_visual_tokens


def slowly_capped(ranked: list[int], visual: list[bool], most: int) -> list[int]:
    """One token after the other."""
    first, last, seen = [], [], 0
    for position in ranked:
        seen += visual[position]
        (last if visual[position] and seen > most else first).append(position)
    return first + last


@given(st.data(), st.integers(1, 40))
def test_equals_the_plain_loop(data: st.DataObject, num_context: int) -> None:
    """For every ranking, mask and cap."""
    ranked = data.draw(st.permutations(range(num_context)))
    visual = data.draw(st.lists(st.booleans(), min_size=num_context, max_size=num_context))
    most = data.draw(st.integers(0, num_context))
    capped = cap_visual(torch.tensor([ranked]), torch.tensor(visual), most)
    assert capped[0].tolist() == slowly_capped(ranked, visual, most)


WINDOW = torch.arange(36, 40)


@given(st.integers(0, 2**31), st.sampled_from(["union", "mean", "unfold"]), st.floats(0, 1))
def test_at_most_the_share_and_always_the_budget(seed: int, gqa: str, share: float) -> None:
    """Text fills what visual tokens give up; the most important visual ones stay."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(2, 3, 4, 8, generator=generator)
    keys = torch.randn(2, 40, 8, generator=generator)
    mask = torch.zeros(40, dtype=torch.bool)
    mask[5:25] = True
    rule = ChoiceRule("received", 3, gqa, window=4)
    counts = {"scale": 0.3, "num_context": 36, "num_kept": 12}
    kept = choose_kept(rule, queries, keys, WINDOW, **counts, visual=VisualCap(mask, share))
    assert kept.shape[-1] == 12
    assert (kept.diff(dim=-1) > 0).all()
    most = max_visual_tokens(12, 20, 36, share)
    num_visual = mask[kept].sum(-1)
    assert (num_visual <= max(most, 0)).all()  # 16 text tokens: they never run out
    ranked = rank_context(rule, queries, keys, WINDOW, **(counts | {"num_kept": 36}))
    for row, of_row in zip(ranked.flatten(0, -2), kept.flatten(0, -2), strict=True):
        best = [p for p in row.tolist() if mask[p]][: int(mask[of_row].sum())]
        assert set(best) == {p for p in of_row.tolist() if mask[p]}


def test_no_cap_is_the_plain_choice() -> None:
    """A share of 1 may still bind where the scores want more than their part: None does not."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(1, 2, n, 8, generator=generator) for n in (4, 30))
    rule = ChoiceRule("received", 3, "union", window=4)
    counts = {"scale": 0.3, "num_context": 28, "num_kept": 10}
    plain = choose_kept(rule, queries, keys[:, 0], torch.arange(26, 30), **counts)
    none_visual = VisualCap(torch.zeros(30, dtype=torch.bool), 0.0)
    assert torch.equal(
        plain,
        choose_kept(rule, queries, keys[:, 0], torch.arange(26, 30), **counts, visual=none_visual),
    )
