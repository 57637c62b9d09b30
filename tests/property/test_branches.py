"""What holds for the prefixes that recur."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_spindle.core.branches import BranchIndex

# Few different blocks, so that prompts share beginnings and part again.
PROMPTS = st.lists(st.lists(st.integers(0, 3), max_size=8), max_size=40)


def chained(prompt: list[int]) -> list[tuple[int, ...]]:
    """A hash per block that stands for the block and all before it."""
    return [tuple(prompt[: i + 1]) for i in range(len(prompt))]


def slow(seen: list[list[int]], prompt: list[int], min_branches: int) -> int:
    """The longest prefix of the prompt that so many different blocks have followed."""
    longest = 0
    for length in range(1, len(prompt)):
        nexts = {p[length] for p in seen if len(p) > length and p[:length] == prompt[:length]}
        if len(nexts) >= min_branches:
            longest = length
    return longest


@given(PROMPTS, st.integers(1, 3))
def test_equals_a_look_at_every_prompt(prompts: list[list[int]], min_branches: int) -> None:
    """The index says what all prompts up to now, laid side by side, say."""
    index = BranchIndex(min_branches=min_branches)
    for i, prompt in enumerate(prompts):
        assert index.add(chained(prompt)) == slow(prompts[: i + 1], prompt, min_branches)


@given(st.lists(st.integers(), min_size=2, max_size=30))
def test_a_growing_chat_has_no_branch(chat: list[int]) -> None:
    """However often its past comes again, each turn only goes on from the last."""
    index = BranchIndex(min_branches=2)
    assert [index.add(chained(chat[:end])) for end in range(1, len(chat) + 1)] == [0] * len(chat)


@given(PROMPTS, st.integers(1, 20))
def test_it_never_grows_beyond_its_bound(prompts: list[list[int]], max_blocks: int) -> None:
    """The oldest blocks are forgotten; what it then says is never longer than it was."""
    small, large = BranchIndex(max_blocks, 2), BranchIndex(min_branches=2)
    for prompt in prompts:
        assert small.add(chained(prompt)) <= large.add(chained(prompt))
        assert len(small) <= max_blocks
