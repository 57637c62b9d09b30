"""Rows of a step that no request has, for ``known_answer``: decodes, some reduced, and a prompt.

Shapes: R rows, K kv heads, T query tokens, C columns of a row, Lb layers of the band.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_spindle.core.budget import BandPlan
from vllm_spindle.engine.step import HeadRows

PLAN = BandPlan(first_block=2, tail_block=4, prompt_blocks=4, prefix_blocks=1)
NUM_COLUMNS = 5  # of a reduced row: its prompt's and one more
MANY_ROWS = 1000  # of one kv head each: FlashAttention 3 goes another way above 992
MANY_TOKENS = 320  # of a prompt: more than a tile of any kernel
# Where kernels are interpreted.
FEW_ROWS, FEW_TOKENS = 3, 20


@dataclass(frozen=True)
class ShamRows:
    """Rows of a step, on the CPU.

    Attributes:
        query_lens: query tokens of each. [R].
        lengths: tokens of each, the query's included, as before the reduction. [R].
        heads: geometry; every other row is reduced, the others are whole.
    """

    query_lens: Tensor
    lengths: Tensor
    heads: HeadRows

    @classmethod
    def of(
        cls, query_lens: list[int], block_size: int, num_kv_heads: int, num_layers: int
    ) -> "ShamRows":
        """Rows with so many query tokens, the even ones reduced, which must have one."""
        plans = [PLAN if row % 2 == 0 else None for row in range(len(query_lens))]
        reduced_tokens = PLAN.prompt_blocks * block_size
        lengths = [
            reduced_tokens + 1 + row % block_size if plan else query_len + block_size // 2
            for row, (plan, query_len) in enumerate(zip(plans, query_lens, strict=True))
        ]
        heads = HeadRows.of(
            plans, lambda plan: [_counts(num_kv_heads, i) for i in range(num_layers)]
        )
        assert heads is not None
        return cls(torch.tensor(query_lens), torch.tensor(lengths), heads)


def _counts(num_kv_heads: int, layer: int) -> tuple[int, ...]:
    """Pages of each head in a region of two blocks: 3 and 1, and in the next layer 1 and 3."""
    if num_kv_heads == 1:
        return (2,)
    counts = [2 + (1 if (head + layer) % 2 == 0 else -1) for head in range(num_kv_heads)]
    counts[-1] += 2 * num_kv_heads - sum(counts)
    return tuple(counts)


def sham_batches(
    block_size: int,
    num_kv_heads: int,
    num_layers: int,
    max_rows: int,
    num_columns: int,
    *,
    is_large: bool,
) -> list[ShamRows]:
    """As a graph of decodes has it, and with a prompt under way between two of them."""
    rows = max(FEW_ROWS, MANY_ROWS // num_kv_heads + 1) if is_large else FEW_ROWS
    prompt = MANY_TOKENS if is_large else FEW_TOKENS
    prompt = min(prompt, num_columns * block_size - block_size // 2)
    own = block_size, num_kv_heads, num_layers
    return [
        ShamRows.of(([1] * rows)[:max_rows], *own),
        ShamRows.of([1, prompt, 1][:max_rows], *own),
    ]


def common_metadata(rows: ShamRows, table: Tensor, num_columns: int) -> CommonAttentionMetadata:
    """vLLM's, of these rows. table: [R, C]; num_columns: of vLLM's tables, at least C."""
    device = table.device
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), rows.query_lens.cumsum(0)]).int()
    num_tokens = int(starts[-1])
    natural = torch.zeros(len(table), num_columns, dtype=torch.int32, device=device)
    natural[:, : table.shape[1]] = table
    return CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=rows.lengths.int().to(device),
        num_reqs=len(table),
        num_actual_tokens=num_tokens,
        max_query_len=int(rows.query_lens.max()),
        max_seq_len=int(rows.lengths.max()),
        block_table_tensor=natural,
        slot_mapping=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        causal=True,
    )
