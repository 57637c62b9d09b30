"""Cover directions by a few of them: the steps that a codebook is built from.

Shapes: N directions (unit vectors), E entries, D head size. Both steps work on ``codes``, [N],
int64, in place: the entry of each direction, or ``UNCOVERED``.
Method: SpindleKV eq. 9-13, Algorithm 1 (arXiv:2507.06517); see ``codebook.py`` for what differs.
"""

import torch
from torch import Tensor

UNCOVERED = -1
GRAPH_ROWS = 4096  # rows of the similarity matrix at a time; the graph itself is N * N bytes


def assign_nearest(directions: Tensor, codes: Tensor, entries: Tensor, threshold: float) -> None:
    """Write the nearest entry above the threshold into the codes that are UNCOVERED."""
    uncovered = (codes == UNCOVERED).nonzero().squeeze(-1)
    if len(entries) == 0 or len(uncovered) == 0:
        return
    best, nearest = (directions[uncovered] @ entries.T).clamp_(max=1).max(dim=-1)
    codes[uncovered] = torch.where(best > threshold, nearest, UNCOVERED)


def cover_greedily(
    directions: Tensor, codes: Tensor, threshold: float, capacity: int, *, first_code: int
) -> Tensor:
    """Greedy cover of the UNCOVERED: the highest degree first, ties to the lowest index.

    Writes the codes of those who are covered.

    Args:
        directions: [N, D].
        codes: [N].
        threshold: cosine above which two directions are neighbours.
        capacity: most members to choose.
        first_code: code of the first member chosen.

    Returns:
        Members chosen, in order. [E], int64.
    """
    uncovered = (codes == UNCOVERED).nonzero().squeeze(-1)
    graph = _graph(directions[uncovered], threshold)
    degrees = graph.sum(dim=-1)  # uncovered neighbours of each, itself included
    is_open = torch.ones_like(uncovered, dtype=torch.bool)
    members: list[int] = []
    while len(members) < capacity and bool(is_open.any()):
        member = int(degrees.masked_fill(~is_open, -1).argmax())  # the first of equals
        neighbours = (graph[member] & is_open).nonzero().squeeze(-1)
        codes[uncovered[neighbours]] = first_code + len(members)
        is_open[neighbours] = False
        degrees -= graph[neighbours].sum(dim=0)
        members.append(member)
    return uncovered[members]


def _graph(directions: Tensor, threshold: float) -> Tensor:
    """Who is similar to whom (eq. 9); everyone to itself, whatever rounding says. [N, N], bool."""
    num_vectors = directions.shape[0]
    graph = torch.empty(num_vectors, num_vectors, dtype=torch.bool, device=directions.device)
    for start in range(0, num_vectors, GRAPH_ROWS):
        rows = directions[start : start + GRAPH_ROWS] @ directions.T
        graph[start : start + GRAPH_ROWS] = rows.clamp_(max=1) > threshold
    return graph.fill_diagonal_(True)
