"""What a codebook costs: counts and bytes, no torch, so that ``plan`` and the scheduler can ask.

Counts are vectors, summed over the heads of a layer: a token kept by 8 kv heads is 8 kept tokens,
and 8 keys and 8 values. Method: SpindleKV eq. 15 (arXiv:2507.06517) as ``paper_ratio``. Differs
from the paper: ``true_bytes`` charges index and norm for every kept vector, where the formula
charges them for every entry, and the positions, which the formula forgets.
"""

from fractions import Fraction

INDEX_BYTES = 2  # uint16: 65,536 entries in a table at most
NORM_BYTES = 2  # float16
POSITION_BYTES = 4  # int32


def paper_ratio(
    *,
    num_tokens: int,
    num_kept: int,
    num_key_entries: int,
    num_value_entries: int,
    head_size: int,
    index_bits: int = 8 * INDEX_BYTES,
    key_bits: int = 16,
) -> Fraction:
    """The paper's own compression ratio of a layer, r1 r2 r3 (eq. 15).

    Under ``unfold`` the paper counts ``num_tokens`` over query heads, copies included: the ratio
    is then one of a cache G times the true one.

    Args:
        num_tokens: tokens times heads before eviction, at least 1.
        num_kept: tokens times heads after eviction.
        num_key_entries: entries of all key codebooks of the layer.
        num_value_entries: the same for values.
        head_size: elements of a vector (d_h).
        index_bits: of one index ("int_bit").
        key_bits: of one element ("key_bit"), the norm's too.
    """
    if num_kept == 0:
        return Fraction(0)
    kept_share = Fraction(num_kept, num_tokens)
    entry_share = Fraction(num_key_entries + num_value_entries, 2 * num_kept)
    entry_cost = 1 + (Fraction(index_bits, key_bits) + 1) / head_size
    return kept_share * entry_share * entry_cost


def true_bytes(
    *,
    num_kept: int,
    num_key_entries: int,
    num_value_entries: int,
    head_size: int,
    element_bytes: int = 2,
    implied_positions: bool = False,
) -> int:
    """Bytes that a layer's codebooks hold: entries, indexes, norms, positions. No padding.

    Args:
        num_kept: tokens times heads that have a code.
        num_key_entries: entries of all key codebooks of the layer.
        num_value_entries: the same for values.
        head_size: elements of an entry.
        element_bytes: of one element of an entry.
        implied_positions: True where every token is kept, so that its place tells its position.
    """
    entries = (num_key_entries + num_value_entries) * head_size * element_bytes
    codes = 2 * num_kept * (INDEX_BYTES + NORM_BYTES)
    positions = 0 if implied_positions else num_kept * POSITION_BYTES
    return entries + codes + positions


def dense_bytes(num_tokens: int, head_size: int, element_bytes: int = 2) -> int:
    """Bytes of the keys and values of ``num_tokens`` tokens times heads, uncompressed."""
    return 2 * num_tokens * head_size * element_bytes
