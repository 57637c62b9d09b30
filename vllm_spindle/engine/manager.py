"""The block-manager policy: a band's blocks before its reduced region go back to the pool.

They go as they were computed, so the prefix cache may keep them: a shared prompt's start is found
again. What lies from the region on is the request's own, unhashed.
"""

from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from vllm_spindle.config import RequestOptions
from vllm_spindle.core.budget import BandPlan
from vllm_spindle.engine.spec import SpindleSpec
from vllm_spindle.policy import SERVERS


class SpindleManager(FullAttentionManager):
    """Full attention, but once a prompt is processed its blocks before the region are freed.

    Freed entries become the null block, so the row keeps its length and allocation stays
    natural: [A B C D E] of a prompt whose region starts at block 2 -> [NULL NULL C D E], and
    with a protected prefix of one block -> [A NULL C D E].
    """

    def __init__(self, kv_cache_spec: SpindleSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.band = kv_cache_spec.band
        self.policy = kv_cache_spec.policy
        self.num_freed_blocks = 0
        self._options: dict[str, RequestOptions] = {}
        self._plans: dict[str, BandPlan] = {}

    def share_options(self, options: dict[str, RequestOptions]) -> None:
        """Use the scheduler's table of what requests set for themselves. request id -> options."""
        self._options = options

    def plan(self, request_id: str, num_prompt_tokens: int) -> BandPlan:
        """What this band holds of the request's prompt once it is reduced."""
        plan = self._plans.get(request_id)
        if plan is None:
            plans = self.policy.plan_request(
                num_prompt_tokens, self._options.get(request_id, SERVERS)
            )
            plan = self._plans[request_id] = plans[self.band]
        return plan

    def max_hit_tokens(self, request: Request) -> int | None:
        """Tokens of a cached prefix that this band lets the request take; None for any number."""
        blocks = self._shareable_blocks(request)
        return None if blocks is None else blocks * self.block_size

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Let the prefix cache know blocks before the reduced region, and no others.

        From the first chunk on: a block is hashed when it is scheduled, before it is computed,
        and found by others at once.
        """
        most = self.max_hit_tokens(request)
        num_tokens = num_tokens if most is None else min(num_tokens, most)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def _shareable_blocks(self, request: Request) -> int | None:
        options = self._options.get(request.request_id, SERVERS)
        return self.policy.shareable(request.num_prompt_tokens, options)[self.band]

    def count_held(self, request_id: str, num_prompt_tokens: int) -> int:
        """Blocks of its prompt that the request holds now, counted in its row."""
        prompt_blocks = self.plan(request_id, num_prompt_tokens).prompt_blocks
        return sum(not block.is_null for block in self.req_to_blocks[request_id][:prompt_blocks])

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free ``[prefix_blocks, first_block)`` once all is processed that the prompt waits for.

        Processed, not merely scheduled: a step in flight still reads the whole row, and the
        worker compacts the row at the end of the step that computes the last of it.
        """
        if num_prompt_tokens is None:
            return
        if processed_computed_tokens < self.policy.reduce_at(num_prompt_tokens):
            return
        blocks = self.req_to_blocks.get(request_id)
        plan = self.plan(request_id, num_prompt_tokens)
        if not blocks or not plan.is_reduced or blocks[plan.first_block - 1].is_null:
            return
        self._remove_blocks_in_range(request_id, plan.prefix_blocks, plan.first_block)
        self.num_freed_blocks += plan.freed_blocks

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """The request's blocks, when it ends or is preempted."""
        self._plans.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)
