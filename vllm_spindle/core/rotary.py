"""Take the rotary position off cached keys, and put it back.

The codebook compares keys before RoPE: the same word's keys differ by their rotation alone, which
hides that they are alike. Keys in the cache are rotated, so they are turned back first, and every
reconstructed key is turned again at its own position.

Shapes: K kv heads, T tokens, D head size, P rows of the table. NeoX style as in most models:
element i turns together with element i + D/2. Method: SpindleKV sec. 3.3 (arXiv:2507.06517), "K is
pre-RoPE". Differs from the paper: no; the paper keeps un-rotated keys, we recover them.
"""

import torch
from torch import Tensor


def rotate_keys(keys: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """Keys turned to their positions.

    Args:
        keys: un-rotated. [..., T, D].
        positions: rows of the table, [T] shared by all heads, or [K, T] (any shape that
            broadcasts to [..., T]).
        cos_sin: cosines, then sines, as in vLLM's ``cos_sin_cache``. [P, D].

    Returns:
        [..., T, D], float32.

    Raises:
        ValueError: if the table does not turn all D elements.
    """
    cos, sin = _turns(keys, positions, cos_sin)
    first, second = keys.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def unrotate_keys(keys: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """Keys turned back from their positions: the inverse of ``rotate_keys``, up to float error.

    float32 also for half-precision keys: a second rounding would cost similarity for nothing.

    Args:
        keys: rotated. [..., T, D].
        positions: see ``rotate_keys``.
        cos_sin: see ``rotate_keys``. [P, D].

    Returns:
        [..., T, D], float32.

    Raises:
        ValueError: if the table does not turn all D elements.
    """
    cos, sin = _turns(keys, positions, cos_sin)
    first, second = keys.float().chunk(2, dim=-1)
    # Not always 1: YaRN's table carries its mscale, and a bfloat16 table is rounded.
    stretch = cos.square() + sin.square()
    turned = torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)
    return turned / torch.cat([stretch, stretch], dim=-1)


def _turns(keys: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's turns. Twice [..., T, D/2], float32."""
    head_size, rotary_dim = keys.shape[-1], cos_sin.shape[-1]
    if rotary_dim != head_size:
        raise ValueError(
            f"rotary_dim must equal the head size, got {rotary_dim} for a head size of {head_size}"
            " (partial rotary embedding is not supported)"
        )
    cos, sin = cos_sin[positions].float().chunk(2, dim=-1)
    return cos, sin
