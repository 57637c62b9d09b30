"""Where a codebook lies in a region of cache blocks: counts, rows and bytes, integers only.

A block holds, per kv head, one contiguous chunk: 2 * block_size rows of D 16-bit elements. The
chunks of a region's R blocks, in order, are one long run of rows per kv head (chunks are not
adjacent in memory). On it lie, each starting on a row:

    key entries   [E_K, D / 2, 2] bf16, unit vectors before RoPE; dimensions i and i + D / 2, which
                  RoPE turns together, lie side by side
    value entries [E_V, D] bf16, unit vectors
    key codes     [N] uint16     value codes [N] uint16
    key norms     [N] float16    value norms [N] float16
    positions     [N] two elements: the lower 14 bits, and what is above them

Tokens are sorted by key code, so that a reader streams the key entries. A head may hold fewer than
N: the slots that are left come last, with EMPTY above the lower bits of their positions.

No element is a NaN or an infinity when read as a float: the blocks come back to the pool, and
vLLM's kernels multiply what lies beyond a sequence's end by zero.
"""

from dataclasses import dataclass

ELEMENT_BYTES = 2
POSITION_BITS = 14
EMPTY = 1 << POSITION_BITS
MAX_ENTRIES = 0x7C00  # of one kv head; codes from there on would be no numbers in float16
# Elements per token of each array, in the order they are stored.
KEY_CODES, VALUE_CODES, KEY_NORMS, VALUE_NORMS, POSITIONS = range(5)
ARRAY_ELEMENTS = (1, 1, 1, 1, 2)
CODE_ELEMENTS = {
    "index_bytes": ARRAY_ELEMENTS[KEY_CODES] + ARRAY_ELEMENTS[VALUE_CODES],
    "norm_bytes": ARRAY_ELEMENTS[KEY_NORMS] + ARRAY_ELEMENTS[VALUE_NORMS],
    "position_bytes": ARRAY_ELEMENTS[POSITIONS],
}
"""What these are, per token: elements."""


def array_rows(num_tokens: int, head_size: int) -> tuple[int, ...]:
    """Rows that each per-token array takes."""
    return tuple(-(-num_tokens * elements // head_size) for elements in ARRAY_ELEMENTS)


def entry_capacity(num_blocks: int, block_size: int, head_size: int, num_tokens: int) -> int:
    """Entries, of keys and values together, that fit per kv head beside N tokens' codes.

    Negative if not even the codes fit.
    """
    return 2 * block_size * num_blocks - sum(array_rows(num_tokens, head_size))


@dataclass(frozen=True, slots=True)
class RegionShape:
    """Capacities of one region, the same for all kv heads of a layer.

    Raises:
        ValueError: if a count is out of range.
    """

    num_key_entries: int
    num_value_entries: int
    num_tokens: int
    block_size: int
    head_size: int

    def __post_init__(self) -> None:
        least = 1 if self.num_tokens else 0
        for name in ("num_key_entries", "num_value_entries"):
            if not least <= getattr(self, name) <= MAX_ENTRIES:
                raise ValueError(
                    f"{name} must be in [{least}, {MAX_ENTRIES}], got {getattr(self, name)}"
                )
        if self.num_tokens < 0 or self.block_size < 1 or self.head_size < 2 or self.head_size % 2:
            raise ValueError(f"no such region: {self}")

    @property
    def array_first_rows(self) -> tuple[int, ...]:
        """Row on which each per-token array starts."""
        row = self.num_key_entries + self.num_value_entries
        first_rows = []
        for rows in array_rows(self.num_tokens, self.head_size):
            first_rows.append(row)
            row += rows
        return tuple(first_rows)

    @property
    def num_rows(self) -> int:
        """Rows in use per kv head."""
        arrays = sum(array_rows(self.num_tokens, self.head_size))
        return self.num_key_entries + self.num_value_entries + arrays

    @property
    def num_blocks(self) -> int:
        """Blocks that the region needs."""
        return -(-self.num_rows // (2 * self.block_size))

    @property
    def used_bytes(self) -> int:
        """Bytes that carry data, per kv head."""
        entries = (self.num_key_entries + self.num_value_entries) * self.head_size
        return ELEMENT_BYTES * (entries + self.num_tokens * sum(ARRAY_ELEMENTS))

    def padding_bytes(self, num_blocks: int) -> int:
        """Bytes of a region of so many blocks that carry nothing, per kv head."""
        row_bytes = ELEMENT_BYTES * self.head_size
        return 2 * self.block_size * num_blocks * row_bytes - self.used_bytes
