"""What holds for every band that admits tokens by rank."""

import math
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracles_codebook as oracles
from vllm_spindle.core.admission import Admitted, admit
from vllm_spindle.core.codebook import reconstruct

THRESHOLDS = (0.95, 0.8)


@dataclass(frozen=True)
class Case:
    """Keys and values [T, D] around a few directions, a ranking of all, and the room."""

    keys: Tensor
    values: Tensor
    ranked: Tensor
    capacity: tuple[int, int, int]
    chunk: int

    def admit(self) -> Admitted:
        """Through the code under test."""
        return admit(
            self.keys, self.values, self.ranked, THRESHOLDS, self.capacity, chunk=self.chunk
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to 24 tokens in up to 5 dimensions, from identical to unrelated."""
    num_tokens, head_size = draw(st.integers(1, 24)), draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    noise = draw(st.sampled_from([0.05, 0.2, 1.0]))

    def vectors() -> Tensor:
        centres = torch.randn(draw(st.integers(1, 8)), head_size, generator=generator)
        which = torch.randint(len(centres), (num_tokens,), generator=generator)
        return centres[which] + noise * torch.randn(num_tokens, head_size, generator=generator)

    room = st.integers(1, 24)
    return Case(
        vectors(),
        vectors(),
        torch.randperm(num_tokens, generator=generator),
        (draw(room), draw(room), draw(room)),
        draw(st.integers(1, 30)),
    )


@settings(max_examples=200)
@given(cases())
def test_the_admitted_are_the_oracles(case: Case) -> None:
    """The same tokens, with the entries and codes of the plain loops."""
    found = case.admit()
    by_rank = (case.keys[case.ranked], case.values[case.ranked], range(len(case.ranked)))
    inside, *tables = oracles.admitted(*by_rank, THRESHOLDS, case.capacity, case.chunk)
    order = sorted(inside, key=lambda rank: int(case.ranked[rank]))
    assert found.tokens.tolist() == [int(case.ranked[rank]) for rank in order]
    for book, table, vectors in zip((found.keys, found.values), tables, by_rank, strict=False):
        directions = vectors / vectors.norm(dim=-1, keepdim=True)
        assert book.codes.tolist() == [table.codes[rank] for rank in order]
        if table.members:
            torch.testing.assert_close(book.entries, directions[table.members])


@given(cases())
def test_nothing_is_stored_beyond_the_thresholds(case: Case) -> None:
    """Whatever the room: an admitted key or value is within the bound of what it was."""
    found = case.admit()
    for book, vectors, threshold in zip(
        (found.keys, found.values), (case.keys, case.values), THRESHOLDS, strict=True
    ):
        own = vectors[found.tokens]
        error = (reconstruct(book) - own).norm(dim=-1)
        bound = math.sqrt(2 * (1 - threshold)) * own.norm(dim=-1)
        assert bool((error <= bound * (1 + 1e-4)).all())


@given(cases())
def test_the_room_is_kept(case: Case) -> None:
    """Entries and tokens within capacity; who was asked is in or refused."""
    found = case.admit()
    sizes = (len(found.keys.entries), len(found.values.entries), len(found.tokens))
    assert all(size <= room for size, room in zip(sizes, case.capacity, strict=True))
    assert 0 <= found.num_refused <= len(case.ranked) - len(found.tokens)
    if len(found.tokens) < case.capacity[2]:
        assert found.num_refused == len(case.ranked) - len(found.tokens)


@given(cases())
def test_with_room_for_all_the_best_are_in(case: Case) -> None:
    """As many entries as tokens: the first in rank are kept, as many as have a place."""
    num_tokens = case.capacity[2]
    whole = (len(case.ranked), len(case.ranked), num_tokens)
    found = admit(case.keys, case.values, case.ranked, THRESHOLDS, whole, chunk=case.chunk)
    assert found.tokens.tolist() == sorted(case.ranked[:num_tokens].tolist())
    assert found.num_refused == 0


@given(cases())
def test_the_very_best_is_never_refused(case: Case) -> None:
    """One token a chunk: the first in rank always has room for its own entries."""
    found = admit(case.keys, case.values, case.ranked, THRESHOLDS, case.capacity, chunk=1)
    assert int(case.ranked[0]) in found.tokens.tolist()
