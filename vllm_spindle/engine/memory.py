"""Device memory that the reduction takes beside the KV cache; vLLM's profiling does not see it."""

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv

from vllm_spindle.core.choice import RANKED_AT_ONCE
from vllm_spindle.engine.graphs import most_captured_tokens
from vllm_spindle.engine.options import policy_for, switched_on

FLOAT = 4
# Of the codebook kernel, see ``kernels.device_decode``; or of FlashAttention's for rows of one kv
# head, which it splits the more for being few.
MAX_SPLIT_BYTES = 256 << 20
# Of a token's scores for one query head: three maps of attention, as many pooled, ranks of two; and
# a sort's keys and int64 places, as it takes, returns and twice turns them over.
RANKING_BYTES = (3 + 3 + 2) * FLOAT + 4 * (FLOAT + 8)


def reserved_bytes(vllm_config: VllmConfig) -> int:
    """Bytes of one rank: persistent buffers, and what reducing the longest prompt needs at once."""
    config = switched_on(vllm_config)
    assert config is not None
    policy = policy_for(vllm_config, config)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    num_kv_heads, head_size = model.get_num_kv_heads(parallel), model.get_head_size()
    num_heads = num_kv_heads * policy.num_queries_per_kv
    element_bytes = model.dtype.itemsize
    most_tokens = model.max_model_len

    query_bytes = policy.num_layers * num_heads * head_size * element_bytes
    staged = most_captured_tokens(vllm_config.compilation_config) * query_bytes
    # Prompts that end in one step or wait for their reduction; more than a few are rare.
    num_observed = config.window + config.num_observers
    windows = 16 * num_observed * query_bytes
    columns = cdiv(most_tokens, policy.block_size)
    rows = vllm_config.scheduler_config.max_num_seqs
    # int32, and the columns that it is gathered from, int64.
    tables = len(policy.bands) * rows * columns * (4 + 8)
    if policy.profile is not None:
        # A row for each kv head; queries and outputs of a step once more, head by head.
        tables = len(policy.bands) * num_kv_heads * (rows + 1) * columns * 4
        step_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        tables += 2 * step_tokens * num_heads * head_size * element_bytes
    # Kept tokens on their way to their blocks, at most all: a key and a value each.
    token_elements = num_kv_heads * head_size
    prompt = most_tokens * token_elements * 2 * element_bytes
    if config.merges:
        # Blocks as they are, keys and values as read; keys in float32 and, in three steps, turned.
        prompt = most_tokens * token_elements * (4 * element_bytes + 4 * FLOAT)
    # The longest prompt alone, or as many layers of a shorter one as are ranked in one go.
    scores = max(RANKED_AT_ONCE, num_heads * most_tokens) * RANKING_BYTES
    splits = MAX_SPLIT_BYTES if config.merges or policy.profile is not None else 0
    return staged + windows + tables + prompt + scores + splits
