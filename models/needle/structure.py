"""A trainable starting point that already looks up n-grams.

Shapes: E hidden size, D head size, C code size of a token.

Random weights learn no retrieval in the time this recipe has, so the first weights hold the
mechanism in rough form and training sharpens it:

- The residual stream is cut into parts: the token's own code, the codes of the tokens one, two and
  three places before (P1, P2, P3), and OUT, what the output layer reads.
- Layer 0: heads whose rotary phase peaks at distance 1, 2, 3 copy the earlier tokens' codes into
  P1, P2, P3.
- Layers above: the query at token t holds (t, P1, P2), the key holds (P1, P2, P3) under the same
  random projections, so a token matches where *its predecessor* and the words before look the same.
  Only rotary pairs that hardly turn over the context carry the match. The value is the matched
  token's own code, written to OUT: the next word of the n-gram.

Everything is trained afterwards, nothing is frozen.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_spindle.evaluation.needle import ANSWER, IS, VOCAB

OWN, P1, P2, P3, OUT = 0, 64, 112, 160, 192  # first row of each part of the residual stream
CODE = 48  # rows of P1 and P2; P3 has 32
CONST = OWN  # one row is 1 for every token: what position-only heads read
NUM_LOCAL_PAIRS = 8  # rotary pairs of the heads of layer 0, fastest first
FIRST_SLOW_PAIR = 10  # turns 0.56 rad in 2,048 tokens at theta 500,000
LOCAL_WRITES = {  # query head of layer 0 -> first row and rows it writes; others are spare
    0: (P1, 32),
    1: (P2, 32),
    2: (P3, 32),
    4: (P1 + 32, 16),
    5: (P2 + 32, 16),
}
LOCAL_GAIN = 7.75  # next-nearest distance gets e**-6
MATCH_GAIN = 0.25  # one matched word adds about 9 to a logit
NOISE_STD = 0.02

MATCHED = (  # per layer above 0, per kv head: the distances whose words are matched
    ((1, 2, 3), (2, 3)),
    ((1, 2), (2, 3)),
    ((1, 2, 3), (2, 3)),
    ((1, 2), (1, 2, 3)),
    ((1, 2, 3), (2, 3)),
)


def needle_config() -> LlamaConfig:
    """Six layers, two KV heads of 32: 1,536 bytes of KV per token in bf16."""
    return LlamaConfig(
        vocab_size=len(VOCAB),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1 + len(MATCHED),
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def structured_model(seed: int) -> LlamaForCausalLM:
    """A float32 model of ``needle_config`` with the weights described above."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(needle_config()).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, NOISE_STD)
        _set_codes(model)
        _set_local_heads(model)
        for layer_idx, matched in enumerate(MATCHED, start=1):
            _set_match_heads(model, layer_idx, matched)
    return model


def _set_codes(model: LlamaForCausalLM) -> None:
    """Random signs as token codes; the output layer reads the same codes from OUT."""
    embedding = model.model.embed_tokens.weight  # [vocabulary, E]
    codes = torch.randint(0, 2, (len(VOCAB), P1)).float() * 2 - 1
    # "=" continues like ":" for the match heads, and differs in the rows they do not read.
    codes[VOCAB.index(ANSWER), : CODE + 1] = codes[VOCAB.index(IS), : CODE + 1]
    codes[:, CONST] = 1.0
    embedding[:, OWN:P1] = codes
    model.lm_head.weight[:, OUT : OUT + 63] += 0.1 * codes[:, 1:]


def _set_local_heads(model: LlamaForCausalLM) -> None:
    """Layer 0: query heads 0-3 and 4-7 look 1, 2, 3, 4 tokens back."""
    config, attention = model.config, model.model.layers[0].self_attn
    head_size, half = config.head_dim, config.head_dim // 2
    theta = config.rope_parameters["rope_theta"]
    pairs = torch.arange(NUM_LOCAL_PAIRS)
    speeds = theta ** (-pairs.float() / half)  # rad per token
    # The embedding's rms is 1/2, so a normed row is twice its sign.
    gain = LOCAL_GAIN / 2
    for kv_head in range(2):
        attention.k_proj.weight[kv_head * head_size + pairs, CONST] = gain
        value_rows = kv_head * head_size + torch.arange(32 - kv_head)
        attention.v_proj.weight[value_rows, 1 + kv_head * 32 + torch.arange(32 - kv_head)] = 1.0
    for head in range(8):
        distance = 1 + head % 4
        rows = head * head_size + pairs
        attention.q_proj.weight[rows, CONST] = gain * torch.cos(speeds * distance)
        attention.q_proj.weight[rows + half, CONST] = -gain * torch.sin(speeds * distance)
    for head, (start, width) in LOCAL_WRITES.items():
        rows = torch.arange(width)
        attention.o_proj.weight[start + rows, head * head_size + rows] = 0.5


def _set_match_heads(model: LlamaForCausalLM, layer_idx: int, matched: tuple) -> None:
    """One layer above 0: n-gram match in the slow rotary pairs, the matched token's code to OUT."""
    attention = model.model.layers[layer_idx].self_attn
    head_size = model.config.head_dim
    slow = torch.arange(FIRST_SLOW_PAIR, head_size // 2)
    slow = torch.cat((slow, slow + head_size // 2))
    starts = (OWN + 1, P1, P2, P3)
    for kv_head in range(2):
        key_rows = kv_head * head_size + slow
        heads = range(4 * kv_head, 4 * kv_head + 4)
        for distance in matched[kv_head]:
            width = 32 if distance == 3 else CODE
            projection = torch.randn(len(slow), width) * MATCH_GAIN * (CODE / width) ** 0.5
            _add(attention.k_proj.weight, key_rows, starts[distance], projection)
            for head in heads:
                query_rows = head * head_size + slow
                _add(attention.q_proj.weight, query_rows, starts[distance - 1], projection)
        size = 32 - kv_head
        rows = torch.arange(size)
        attention.v_proj.weight[kv_head * head_size + rows, 1 + kv_head * 32 + rows] += 1.0
        for head in heads:
            attention.o_proj.weight[OUT + kv_head * 32 + rows, head * head_size + rows] += 0.25


def _add(weight: Tensor, rows: Tensor, start: int, block: Tensor) -> None:
    """Add ``block`` to ``weight`` at ``rows`` and the columns from ``start`` on."""
    weight[rows, start : start + block.shape[1]] += block
