"""Which rows of a packed picture are line ends, and the grids that the others fill.

Shapes: N rows of an item, D width. LLaVA-NeXT and LLaVA-OneVision pack a picture as

    [base crop, rows x cols] [line 1, newline] [line 2, newline] ...

a single crop as [crop, newline], and OneVision a video as [frame] [frame] ... [newline]. The
newline is one learned embedding, the same in every row where it stands.
"""

import torch
from torch import Tensor


def newline_mask(rows: Tensor, newline: Tensor) -> Tensor:
    """True where a row is the newline embedding.

    Args:
        rows: packed rows. [N, D].
        newline: the model's ``image_newline``. [D].

    Returns:
        [N], bool.
    """
    return (rows == newline.to(rows.device, rows.dtype)).all(dim=1)


def packed_grids(newlines: Tensor, crop: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """The grids that the candidates of a packed picture fill.

    For example crop (2, 2) and newlines after rows 4 + 3 and 4 + 3 + 1 + 3:
    ``((2, 2), (2, 3))``.

    Args:
        newlines: from ``newline_mask``. [N], bool.
        crop: rows and columns of a crop or frame.

    Returns:
        (rows, cols) of each crop, frame or picture; empty if the mask is of another packing.
    """
    ends = newlines.nonzero().squeeze(1)
    num_candidates = int(newlines.numel() - ends.numel())
    crop_size = crop[0] * crop[1]
    last_is_newline = ends.numel() > 0 and int(ends[-1]) == newlines.numel() - 1
    if (
        ends.numel() <= 1
        and (last_is_newline or ends.numel() == 0)
        and not num_candidates % crop_size
    ):
        return (crop,) * (num_candidates // crop_size)
    lengths = torch.diff(ends, prepend=ends.new_tensor([crop_size - 1])) - 1
    cols = int(lengths[0]) if lengths.numel() else 0
    if last_is_newline and cols > 0 and bool((lengths == cols).all()):
        return (crop, (int(ends.numel()), cols))
    return ()
