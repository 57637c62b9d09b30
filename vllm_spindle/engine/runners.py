"""What the reduction reads off a model runner: the step's rows, and the blocks of a row.

vLLM has two runners with different tables; everything behind this file is the same for both.
Integers on the host only, known from what the scheduler sent: nothing waits for a device.
"""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vllm_spindle.engine.step import BatchView


class RunnerView(Protocol):
    """One runner's tables."""

    def batch(self, scheduler_output: Any) -> BatchView:
        """The rows of the step, in the order in which attention sees them; once it is prepared."""

    def block_ids(self, group: int, request_id: str) -> Tensor:
        """A request's row in a KV-cache group, null blocks as they were before. int64."""

    def table_block_sizes(self) -> list[int]:
        """Tokens per entry of each group's block table."""


def view_of(runner: Any) -> RunnerView:
    """The view of a runner of either kind."""
    return RunnerViewV2(runner) if hasattr(runner, "req_states") else RunnerViewV1(runner)


class RunnerViewV1:
    """``vllm.v1.worker.gpu_model_runner``: a persistent batch."""

    def __init__(self, runner: Any) -> None:
        """Args: runner: vLLM's."""
        self._runner = runner

    def batch(self, scheduler_output: Any) -> BatchView:
        """As in the batch, in which a request keeps its row while it runs."""
        batch = self._runner.input_batch
        request_ids = batch.req_ids
        scheduled = scheduler_output.num_scheduled_tokens
        return BatchView(
            request_ids=request_ids,
            prompt_lens=batch.num_prompt_tokens[: len(request_ids)],
            num_computed=batch.num_computed_tokens_cpu[: len(request_ids)],
            num_scheduled=np.array([scheduled[request_id] for request_id in request_ids]),
        )

    def block_ids(self, group: int, request_id: str) -> Tensor:
        """Not from the batch: who waits for its reduction is not in it."""
        block_ids = self._runner.requests[request_id].block_ids[group]
        return torch.tensor(block_ids, dtype=torch.int64)

    def table_block_sizes(self) -> list[int]:
        """As the batch's tables have them."""
        return [table.block_size for table in self._runner.input_batch.block_table.block_tables]


class RunnerViewV2:
    """``vllm.v1.worker.gpu.model_runner``: a slot per request, rows sorted anew each step."""

    def __init__(self, runner: Any) -> None:
        """Args: runner: vLLM's."""
        self._runner = runner

    def batch(self, scheduler_output: Any) -> BatchView:
        """In the runner's own order, by its own function."""
        from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids

        scheduled, states = scheduler_output.num_scheduled_tokens, self._runner.req_states
        request_ids = sort_batch_req_ids(
            scheduled,
            scheduler_output.scheduled_spec_decode_tokens,
            self._runner.decode_query_len,
        )
        slots = [states.req_id_to_index[request_id] for request_id in request_ids]
        return BatchView(
            request_ids=request_ids,
            # Not prefill_len: after a preemption that counts output, too.
            prompt_lens=states.prompt_len.np[slots],
            num_computed=states.num_computed_tokens_np[slots],
            num_scheduled=np.array([scheduled[request_id] for request_id in request_ids]),
        )

    def block_ids(self, group: int, request_id: str) -> Tensor:
        """From the table that rows are gathered from; who is not scheduled keeps its slot."""
        tables, slot = self._runner.block_tables, self._runner.req_states.req_id_to_index
        index = slot[request_id]
        num_blocks = int(tables.num_blocks.np[group, index])
        row: Tensor = tables.block_tables[group].gpu[index, :num_blocks]
        return row.to(torch.int64)

    def table_block_sizes(self) -> list[int]:
        """As the runner's tables have them."""
        return list(self._runner.block_tables.block_sizes)
