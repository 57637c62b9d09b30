"""The observed queries, kept from the forward pass until the prompt is reduced.

Queries are activations: after the forward they are gone, and those that score a prompt, its window
and the observers before it (``core/observers.py``), may be spread over many chunks.

A forward of at most ``staged_tokens`` tokens may be a captured CUDA graph, which runs no Python and
knows the addresses of its capture alone. So ``record`` copies all queries of such a forward, row
for row, into one persistent buffer, whatever the step asks for; a larger forward is never a graph,
and ``record`` takes the step's observed rows at once. ``settle``, after the forward, hands each
request its rows. Memory: the staging buffer, and the queries of prompts that are not reduced yet.

Shapes: L layers, Q observed tokens of a prompt, H query heads, D head size, n observed tokens of a
step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_spindle.core.transfer import to_device
from vllm_spindle.engine.step import WindowRows


@dataclass(frozen=True)
class _Piece:
    """A request's rows [first, stop) among a step's observed queries, [n, H, D] of each layer."""

    layers: Sequence[Tensor]
    first: int
    stop: int


class WindowStash:
    """Observed queries of the running step, and of every prompt that waits for its end."""

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        staged_tokens: int = 0,
    ) -> None:
        """Allocate.

        Args:
            num_layers: L, all of the model's.
            num_heads: H, this rank's.
            head_size: D.
            dtype: of the queries.
            device: of the queries.
            staged_tokens: most tokens of a forward that may be a graph; 0 without graphs.
        """
        self._staged = torch.zeros(
            num_layers, staged_tokens, num_heads, head_size, dtype=dtype, device=device
        )
        self._taken: list[Tensor | None] = [None] * num_layers
        self._rows: WindowRows | None = None
        self._source = torch.empty(0, dtype=torch.int64, device=device)
        self._pieces: dict[str, list[_Piece]] = {}

    def expect(self, rows: WindowRows | None) -> None:
        """Before the forward: the step's observed queries, None if it has none."""
        self._rows = rows
        self._taken = [None] * len(self._taken)
        if rows is not None:
            self._source = to_device(rows.source, self._staged.device)

    def record(self, layer_idx: int, queries: Tensor) -> None:
        """In the forward, once for each layer. queries: of all tokens and padding, [T, H, D]."""
        if len(queries) <= self._staged.shape[1]:
            self._staged[layer_idx, : len(queries)].copy_(queries)
        elif self._rows is not None:
            self._taken[layer_idx] = queries.index_select(0, self._source)

    def settle(self) -> None:
        """After the forward: the step's rows, each request its own; nothing the second time."""
        rows, self._rows = self._rows, None
        if rows is None:
            return
        taken = [layer for layer in self._taken if layer is not None]
        assert len(taken) in (0, len(self._taken))
        # Nothing taken: staged, perhaps by a graph.
        layers = taken or self._staged.index_select(1, self._source)
        first = 0
        for request_id, count in rows.counts:
            piece = _Piece(layers, first, first + count)
            self._pieces.setdefault(request_id, []).append(piece)
            first += count

    def release(self, request_id: str) -> None:
        """Forget the request's queries; nothing happens if it has none."""
        self._pieces.pop(request_id, None)

    def holders(self) -> list[str]:
        """Requests that have queries here."""
        return list(self._pieces)

    def read(self, layer_idx: int, request_id: str) -> Tensor:
        """The observed queries of a request, oldest first. [Q, H, D]."""
        pieces = [
            piece.layers[layer_idx][piece.first : piece.stop] for piece in self._pieces[request_id]
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
