"""The observation window's queries, kept from the forward pass until the prompt ends.

Queries are activations: after the forward they are gone, and a window may straddle chunks. They
are copied by index into one persistent buffer, with no data-dependent control flow, so that the
same copy can be captured in a CUDA graph.

Shapes: L layers, S slots, W window, H query heads, D head size.
"""

import torch
from torch import Tensor


class WindowStash:
    """Slots of W queries per layer, one slot per request whose prompt is about to end."""

    def __init__(
        self, num_layers: int, window: int, num_heads: int, head_size: int, dtype: torch.dtype
    ) -> None:
        self._row_shape = (num_heads, head_size)
        self._num_layers = num_layers
        self._window = window
        self._dtype = dtype
        self._slot_of: dict[str, int] = {}
        self._free: list[int] = []
        self._buffer = torch.empty(num_layers, 0, num_heads, head_size, dtype=dtype)

    def slot(self, request_id: str) -> int:
        """The request's slot, taken on first use; the buffer doubles when none is free."""
        if request_id not in self._slot_of:
            if not self._free:
                self._grow()
            self._slot_of[request_id] = self._free.pop()
        return self._slot_of[request_id]

    def release(self, request_id: str) -> None:
        """Give the request's slot back; nothing happens if it has none."""
        slot = self._slot_of.pop(request_id, None)
        if slot is not None:
            self._free.append(slot)

    def holders(self) -> list[str]:
        """Requests that hold a slot."""
        return list(self._slot_of)

    def rows(self, slot: int, first: int, count: int) -> Tensor:
        """Buffer rows of window offsets ``[first, first + count)`` of a slot, int64."""
        start = slot * self._window + first
        return torch.arange(start, start + count)

    def record(self, layer_idx: int, queries: Tensor, source: Tensor, target: Tensor) -> None:
        """Copy ``queries[source]`` to buffer rows ``target``. queries: [T, H, D]."""
        self._buffer[layer_idx].index_copy_(0, target, queries.index_select(0, source))

    def read(self, layer_idx: int, slot: int) -> Tensor:
        """The window's queries of a slot, oldest first. [W, H, D]."""
        start = slot * self._window
        return self._buffer[layer_idx, start : start + self._window]

    def _grow(self) -> None:
        num_slots = self._buffer.shape[1] // self._window
        added = max(num_slots, 4)
        more = torch.empty(
            self._num_layers, added * self._window, *self._row_shape, dtype=self._dtype
        )
        self._buffer = torch.cat((self._buffer, more), dim=1)
        self._free.extend(range(num_slots + added - 1, num_slots - 1, -1))
