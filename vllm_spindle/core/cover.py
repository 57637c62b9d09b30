"""Cover directions by a few of them: the two steps that a codebook is built from.

Shapes: N directions (unit vectors), E entries, D head size. Codes, [N], int64, are the entry of
each direction, or ``UNCOVERED``.
Method: SpindleKV eq. 9-13, Algorithm 1 (arXiv:2507.06517); see ``codebook.py`` for what differs.
"""

import torch
from torch import Tensor

UNCOVERED = -1
GRAPH_ROWS = 4096  # rows of the similarity matrix at a time; the graph itself is N * N bytes


def nearest_entry(directions: Tensor, entries: Tensor, threshold: float) -> Tensor:
    """Code of the nearest entry above the threshold. entries: [E, D], E at least 1. [N]."""
    best, nearest = (directions @ entries.T).clamp_(max=1).max(dim=-1)
    return torch.where(best > threshold, nearest, UNCOVERED)


def cover_greedily(directions: Tensor, threshold: float, capacity: int) -> tuple[Tensor, Tensor]:
    """Greedy cover: the highest degree first, ties to the lowest index.

    Args:
        directions: [N, D].
        threshold: cosine above which two directions are neighbours.
        capacity: most members to choose.

    Returns:
        Codes, [N], and the members chosen, in order, [E], int64.
    """
    graph = _graph(directions, threshold)
    degrees = graph.sum(dim=-1)  # uncovered neighbours of each, itself included
    codes = torch.full_like(degrees, UNCOVERED)
    members: list[int] = []
    while len(members) < capacity and bool((codes == UNCOVERED).any()):
        is_open = codes == UNCOVERED
        member = int(degrees.masked_fill(~is_open, -1).argmax())  # the first of equals
        neighbours = (graph[member] & is_open).nonzero().squeeze(-1)
        codes[neighbours] = len(members)
        degrees -= graph[neighbours].sum(dim=0)
        members.append(member)
    return codes, torch.tensor(members, dtype=torch.int64, device=directions.device)


def _graph(directions: Tensor, threshold: float) -> Tensor:
    """Who is similar to whom (eq. 9); everyone to itself, whatever rounding says. [N, N], bool."""
    num_vectors = directions.shape[0]
    graph = torch.empty(num_vectors, num_vectors, dtype=torch.bool, device=directions.device)
    for start in range(0, num_vectors, GRAPH_ROWS):
        rows = directions[start : start + GRAPH_ROWS] @ directions.T
        graph[start : start + GRAPH_ROWS] = rows.clamp_(max=1) > threshold
    return graph.fill_diagonal_(True)
