"""The block-manager policy on vLLM's real block pool, without an engine."""

from typing import Any

import pytest
import torch

from vllm_spindle.config import RequestOptions, SpindleConfig
from vllm_spindle.policy import SpindlePolicy

pytestmark = pytest.mark.engine

BLOCK_SIZE = 32
NUM_BLOCKS = 200
PROMPT_LEN = 1000
POLICY = SpindlePolicy(
    config=SpindleConfig(keep_ratio=0.25), num_layers=8, block_size=BLOCK_SIZE, num_queries_per_kv=4
)


def _spec(band: int) -> Any:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_spindle.engine.spec import SpindleSpec

    stock = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=2, head_size=32, dtype=torch.bfloat16
    )
    return SpindleSpec.of(stock, band=band, policy=POLICY)


@pytest.fixture
def pool() -> Any:
    """A pool that must be full again when the test ends: no leak, no double free."""
    from vllm.v1.core.block_pool import BlockPool

    pool = BlockPool(num_gpu_blocks=NUM_BLOCKS, enable_caching=False, hash_block_size=BLOCK_SIZE)
    yield pool
    assert pool.get_num_free_blocks() == NUM_BLOCKS - 1
    free = {block.block_id for block in pool.free_block_queue.get_all_free_blocks()}
    assert len(free) == NUM_BLOCKS - 1
    assert all(block.ref_cnt == 0 for block in pool.blocks if not block.is_null)


def _manager(pool: Any, band: int = 2) -> Any:
    from vllm_spindle.engine.manager import SpindleManager

    return SpindleManager(
        _spec(band),
        block_pool=pool,
        enable_caching=False,
        kv_cache_group_id=0,
        scheduler_block_size=BLOCK_SIZE,
    )


def _held(manager: Any, request_id: str = "r") -> list[bool]:
    return [not block.is_null for block in manager.req_to_blocks[request_id]]


@pytest.mark.parametrize("band", range(4))
def test_blocks_before_the_region_are_freed_once(pool: Any, band: int) -> None:
    """[0, first_block) goes back when the prompt is processed; asking again changes nothing."""
    manager = _manager(pool, band)
    plan = POLICY.plan(PROMPT_LEN)[band]
    manager.allocate_new_blocks("r", PROMPT_LEN, PROMPT_LEN)
    assert _held(manager) == [True] * plan.prompt_blocks
    for processed in (0, 300, PROMPT_LEN - 1):
        manager.remove_skipped_blocks("r", processed, PROMPT_LEN)
        assert all(_held(manager))
    for processed in (PROMPT_LEN, PROMPT_LEN, PROMPT_LEN + 50):
        manager.remove_skipped_blocks("r", processed, PROMPT_LEN)
        assert _held(manager) == [False] * plan.first_block + [True] * plan.held_blocks
        assert pool.get_num_free_blocks() == NUM_BLOCKS - 1 - plan.held_blocks
    assert manager.num_freed_blocks == plan.first_block > 0
    manager.free("r")


def test_decode_allocates_at_the_natural_index(pool: Any) -> None:
    """A reduced row grows by a block where a whole one would, and not before."""
    manager = _manager(pool)
    plan = POLICY.plan(PROMPT_LEN)[2]
    manager.allocate_new_blocks("r", PROMPT_LEN, PROMPT_LEN)
    manager.remove_skipped_blocks("r", PROMPT_LEN, PROMPT_LEN)
    full = plan.prompt_blocks * BLOCK_SIZE
    assert manager.allocate_new_blocks("r", full, full) == []
    assert len(manager.allocate_new_blocks("r", full + 1, full + 1)) == 1
    assert len(manager.req_to_blocks["r"]) == plan.prompt_blocks + 1
    assert sum(_held(manager)) == plan.held_blocks + 1
    assert manager.count_held("r", PROMPT_LEN) == plan.held_blocks
    manager.free("r")


def test_a_request_follows_its_own_ratio(pool: Any) -> None:
    """The shared table of ratios decides per request; 1.0 keeps every block."""
    manager = _manager(pool)
    manager.share_options({"half": RequestOptions(0.5), "all": RequestOptions(1.0)})
    for request_id, keep_ratio in (("r", None), ("half", 0.5), ("all", 1.0)):
        manager.allocate_new_blocks(request_id, PROMPT_LEN, PROMPT_LEN)
        manager.remove_skipped_blocks(request_id, PROMPT_LEN, PROMPT_LEN)
        plan = POLICY.plan(PROMPT_LEN, keep_ratio)[2]
        assert sum(_held(manager, request_id)) == plan.held_blocks
    assert sum(_held(manager)) < sum(_held(manager, "half")) < sum(_held(manager, "all"))
    for request_id in ("r", "half", "all"):
        manager.free(request_id)


def test_freed_before_after_or_without_a_reduction(pool: Any) -> None:
    """An abort at any moment gives back what is held then, and an unknown request nothing."""
    manager = _manager(pool)
    manager.allocate_new_blocks("early", 300, 300)
    manager.free("early")
    manager.remove_skipped_blocks("early", PROMPT_LEN, PROMPT_LEN)
    manager.remove_skipped_blocks("unknown", PROMPT_LEN, PROMPT_LEN)
    manager.free("unknown")
    manager.allocate_new_blocks("short", 20, 20)
    manager.remove_skipped_blocks("short", 20, 20)
    assert _held(manager, "short") == [True]
    manager.free("short")


def test_a_freed_block_serves_the_next_request(pool: Any) -> None:
    """What one request freed another may hold, while the first keeps the rest."""
    manager = _manager(pool)
    for index in range(12):
        request_id = f"r{index}"
        manager.allocate_new_blocks(request_id, PROMPT_LEN, PROMPT_LEN)
        manager.remove_skipped_blocks(request_id, PROMPT_LEN, PROMPT_LEN)
    # Whole, 12 prompts of 32 blocks would need 384 of the 199.
    rows = [block for row in manager.req_to_blocks.values() for block in row if not block.is_null]
    assert len({block.block_id for block in rows}) == len(rows)
    for index in range(12):
        manager.free(f"r{index}")


def test_bands_stay_apart() -> None:
    """Specs of two bands never merge into one group; specs of one band do."""
    first, second = _spec(0), _spec(1)
    assert first.merge([first, _spec(0)]) == first
    with pytest.raises(AssertionError, match="different bands"):
        first.merge([first, second])
    assert first.is_uniform_with_collection({"a": first, "b": _spec(0)})
    assert not first.is_uniform_with_collection({"a": first, "b": second})


def test_registering_twice_keeps_the_built_in_specs() -> None:
    """vLLM's own specs are still known after ours, and ours has our manager."""
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from vllm_spindle.engine.manager import SpindleManager
    from vllm_spindle.engine.registration import register_spec

    register_spec()
    register_spec()
    stock = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=2, head_size=32, dtype=torch.bfloat16
    )
    assert KVCacheSpecRegistry.get_manager_class(stock) is FullAttentionManager
    assert KVCacheSpecRegistry.get_manager_class(_spec(1)) is SpindleManager
