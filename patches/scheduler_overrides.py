"""Guard: vLLM has the methods that a scheduler and a block manager of ours override, and calls.

Subclasses change nothing of vLLM's, but an override of a method that vLLM has renamed is silent: it
is never called. Without the cut of a prefix-cache hit, say, a region would overwrite shared blocks.
"""

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from vllm_spindle_patches.guard import require_parameters

NEEDED: tuple[tuple[Any, str, tuple[str, ...]], ...] = (
    (Scheduler, "add_request", ("request",)),
    (Scheduler, "schedule", ()),
    (Scheduler, "update_from_output", ("scheduler_output", "model_runner_output")),
    (Scheduler, "make_stats", ()),
    (
        Scheduler,
        "_reserve_prefill_lookahead",
        ("request", "num_computed_tokens", "num_new_tokens"),
    ),
    (Scheduler, "_get_local_prefix_cache_hit", ("request",)),
    (Scheduler, "_preempt_request", ("request",)),
    (Scheduler, "_free_blocks", ("request",)),
    (FullAttentionManager, "cache_blocks", ("request", "num_tokens")),
    (
        FullAttentionManager,
        "remove_skipped_blocks",
        ("request_id", "processed_computed_tokens", "num_prompt_tokens"),
    ),
    (FullAttentionManager, "pop_blocks_for_free", ("request_id",)),
    (
        FullAttentionManager,
        "_remove_blocks_in_range",
        ("request_id", "first_block", "last_block"),
    ),
    (
        KVCacheManager,
        "remove_skipped_blocks",
        ("request_id", "processed_computed_tokens", "num_prompt_tokens"),
    ),
    (KVCacheManager, "truncate_computed_blocks", ()),
)
"""Owner, method, parameters that we take or pass."""


def check() -> None:
    """Stop start-up by name if one is missing.

    Raises:
        PatchMismatchError: naming the method and what is missing.
    """
    for owner, name, parameters in NEEDED:
        require_parameters(owner, name, "self", *parameters)
