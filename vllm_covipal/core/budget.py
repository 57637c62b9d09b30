"""How many visual tokens are kept: integer arithmetic, known before the data.

The processor that shrinks the placeholders and the worker that chooses the rows call the same
function and so agree without a message between them. No torch; ratios are rounded here and
nowhere else.
"""

from fractions import Fraction


def kept_tokens(num_candidates: int, keep_ratio: float) -> int:
    """Visual tokens kept of one mm_item: the ratio's share rounded up, at least one if any.

    The ratio counts as its shortest decimal text: 0.07 of 100 is 7, although the binary product
    is 7.000000000000001.

    Raises:
        ValueError: if ``num_candidates`` is negative or ``keep_ratio`` is outside (0, 1].
    """
    if num_candidates < 0:
        raise ValueError(f"num_candidates must be at least 0, got {num_candidates}")
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio must be in (0, 1], got {keep_ratio}")
    exact = Fraction(str(float(keep_ratio))) * num_candidates
    return -(-exact.numerator // exact.denominator)


def kept_rows(num_rows: int, num_structure: int, keep_ratio: float) -> int:
    """Rows of one mm_item that reach the language model, structure rows included.

    Args:
        num_rows: all rows of the item, structure included.
        num_structure: rows that are always kept (newlines, separators), 0 to ``num_rows``.
        keep_ratio: share of the other rows that is kept, (0, 1].

    Raises:
        ValueError: if there are more structure rows than rows, or as ``kept_tokens``.
    """
    if not 0 <= num_structure <= num_rows:
        raise ValueError(f"num_structure must be in [0, {num_rows}], got {num_structure}")
    return num_structure + kept_tokens(num_rows - num_structure, keep_ratio)
