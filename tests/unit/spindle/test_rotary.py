"""Rotation of keys: against complex numbers, and there and back."""

import pytest
import torch
from torch import Tensor

import oracles_codebook as oracles
from vllm_spindle.core.rotary import rotate_keys, unrotate_keys

HEAD_SIZE, NUM_POSITIONS = 8, 40
TABLE = oracles.cos_sin_table(NUM_POSITIONS, HEAD_SIZE)


def _keys(*shape: int) -> Tensor:
    return torch.randn(*shape, HEAD_SIZE, generator=torch.Generator().manual_seed(0))


def test_rotation_equals_complex_numbers() -> None:
    """Element i and element i + D/2 turn together, by the position times their speed."""
    keys, positions = _keys(2, 3), torch.tensor([0, 7, 39])
    rotated = rotate_keys(keys, positions, TABLE)
    for head in range(2):
        for token, position in enumerate(positions.tolist()):
            expected = oracles.rotate(keys[head, token], position)
            torch.testing.assert_close(rotated[head, token], expected)


def test_each_head_has_its_own_positions() -> None:
    """Positions [K, T] turn every head's tokens by themselves."""
    keys, positions = _keys(2, 3), torch.tensor([[0, 7, 39], [1, 2, 3]])
    rotated = rotate_keys(keys, positions, TABLE)
    for head in range(2):
        assert torch.equal(rotated[head], rotate_keys(keys[head], positions[head], TABLE))
    assert not torch.equal(rotated, rotate_keys(keys, positions[0], TABLE))


@pytest.mark.parametrize("positions", [torch.arange(5), torch.tensor([[4] * 5, [39, 0, 3, 3, 1]])])
def test_unrotation_is_the_inverse(positions: Tensor) -> None:
    """There and back is the key itself, to float rounding."""
    keys = _keys(2, 5)
    back = unrotate_keys(rotate_keys(keys, positions, TABLE), positions, TABLE)
    torch.testing.assert_close(back, keys, rtol=0, atol=2e-6)


@pytest.mark.parametrize("table", [1.3 * TABLE, TABLE.bfloat16()], ids=["yarn", "bfloat16"])
def test_unrotation_undoes_a_table_that_stretches(table: Tensor) -> None:
    """A table with YaRN's factor, or rounded to bfloat16, is undone as it was done."""
    keys, positions = _keys(2, 5), torch.tensor([0, 3, 9, 27, 39])
    back = unrotate_keys(rotate_keys(keys, positions, table), positions, table)
    torch.testing.assert_close(back, keys, rtol=0, atol=2e-6)


def test_a_cached_bfloat16_key_comes_back_to_its_rounding() -> None:
    """A key that was rounded when it was cached loses no more than that rounding: 2**-8."""
    keys, positions = _keys(2, 40), torch.arange(40)
    cached = rotate_keys(keys, positions, TABLE).bfloat16()
    back = unrotate_keys(cached, positions, TABLE)
    assert back.dtype == torch.float32
    error = (back - keys).norm(dim=-1) / keys.norm(dim=-1)
    assert float(error.max()) < 2**-8


@pytest.mark.parametrize("turn", [rotate_keys, unrotate_keys])
def test_partial_rotary_is_refused(turn: object) -> None:
    """A table that turns fewer elements than a head has is refused with both numbers."""
    with pytest.raises(ValueError, match="got 6 for a head size of 8"):
        turn(_keys(3), torch.arange(3), TABLE[:, :6])
