"""Unpruned visual embeddings, kept for the next question on the same image or video."""

from collections import OrderedDict

from torch import Tensor

Key = tuple[int, int]


class FeatureCache:
    """Least recently used out, bounded in bytes.

    Every rank of a tensor-parallel group sees the same items in the same order, so all hold the
    same entries.
    """

    def __init__(self, max_bytes: int) -> None:
        """Args: max_bytes: 0 keeps nothing."""
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[Key, Tensor] = OrderedDict()

    def get(self, key: Key) -> Tensor | None:
        """An item's rows, which become the most recently used. [N, D]."""
        rows = self._entries.get(key)
        if rows is not None:
            self._entries.move_to_end(key)
        return rows

    def put(self, key: Key, rows: Tensor) -> None:
        """Keep an item's rows, if they fit at all."""
        if key in self._entries or rows.nbytes > self._max_bytes:
            return
        self._entries[key] = rows.clone()  # a view would hold its whole batch
        self._bytes += rows.nbytes
        while self._bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= oldest.nbytes

    def clear(self) -> None:
        """Forget everything: the weights are others now."""
        self._entries.clear()
        self._bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        return self._bytes
