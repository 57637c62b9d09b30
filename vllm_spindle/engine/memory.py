"""Device memory that the reduction takes beside the KV cache; vLLM's profiling does not see it."""

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv

from vllm_spindle.core.scoring import MOST_AT_ONCE
from vllm_spindle.engine.graphs import most_captured_tokens
from vllm_spindle.engine.options import policy_for, switched_on

FLOAT = 4
MAX_SPLIT_BYTES = 256 << 20  # of the codebook kernel, see ``kernels.device_decode``


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
    # int32, and the columns that it is gathered from, int64.
    columns = cdiv(most_tokens, policy.block_size)
    rows = vllm_config.scheduler_config.max_num_seqs
    tables = len(policy.bands) * rows * columns * (4 + 8)
    # Keys as read, in float32 and transposed; values; logits, their softmax and its mask.
    prompt = most_tokens * num_kv_heads * head_size * (3 * element_bytes + 2 * FLOAT)
    # The window's attention at once, the observers' in parts.
    at_once = max(num_heads * config.window * most_tokens, MOST_AT_ONCE["cuda"])
    logits = 3 * FLOAT * at_once
    splits = MAX_SPLIT_BYTES if config.merges else 0
    return staged + windows + tables + prompt + logits + splits
