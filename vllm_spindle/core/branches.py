"""Prefixes that recur: where prompts that begin alike have gone apart.

A system prompt is followed by something else each time; a chat that grows repeats its past and
only ever goes on from its end. So what is worth keeping for others ends where prompts branch off,
not where they were seen before. Hashes of blocks only, no torch.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

MIN_BRANCHES = 3
"""Different next blocks that make a prefix recurring. Two are also an answer asked for again."""


class BranchIndex:
    """The last blocks seen, each with the few different blocks that came after it."""

    def __init__(self, max_blocks: int = 1 << 16, min_branches: int = MIN_BRANCHES) -> None:
        """Nothing seen yet.

        Args:
            max_blocks: most blocks to remember; the one unseen for longest is forgotten first.
            min_branches: different next blocks from which on a prefix recurs.
        """
        self._max_blocks = max_blocks
        self._min_branches = min_branches
        self._next: OrderedDict[Hashable, set[Hashable]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._next)

    def add(self, hashes: Sequence[Hashable]) -> int:
        """Take note of a prompt.

        Args:
            hashes: of its full blocks, each standing for its block and all before it.

        Returns:
            Blocks of the longest prefix of it that recurs, this prompt counted; 0 if none does.
        """
        longest = 0
        for i in range(len(hashes) - 1):
            followers = self._next.setdefault(hashes[i], set())
            self._next.move_to_end(hashes[i])
            if len(followers) < self._min_branches:
                followers.add(hashes[i + 1])
            if len(followers) >= self._min_branches:
                longest = i + 1
        while len(self._next) > self._max_blocks:
            self._next.popitem(last=False)
        return longest
