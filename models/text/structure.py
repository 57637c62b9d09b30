"""A trainable starting point that already looks up n-grams, with room for a language.

Random weights do not come to use their context in the time this recipe has. The idea is that of
``models/needle/structure.py``: layer 0 copies the codes of the three tokens before, layers 1 and 2
match them in the rotary pairs that hardly turn over a prompt, and write what followed to the rows
that the output layer reads. Half of the matching layers' query heads, the layers above and most
hidden units are left to the language.

Shapes: E hidden size, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 2048
OWN, P1, P2, P3, OUT = 0, 64, 112, 160, 192  # first row of each part of the residual stream
HIDDEN = 256
CODE = 48  # rows of P1 and P2; P3 has 32
CONST = OWN  # one row is 1 for every token
NUM_LOCAL_PAIRS, FIRST_SLOW_PAIR = 14, 15  # rotary pairs: to look back with, to match with
ROPE_THETA = 1e7  # pair 15 turns 0.6 rad in 1,152 tokens
LOCAL_WRITES = {0: (P1, CODE), 1: (P2, CODE), 2: (P3, 32)}  # head of layer 0: first row, rows
LOCAL_GAIN = 7.75  # next-nearest distance gets e**-6
MATCH_GAIN = 0.2
WRITE_GAIN = 0.3
READ_GAIN = 0.2
NOISE_STD = 0.02
MATCHED = (((1, 2, 3), (1, 2)), ((1, 2, 3), (1, 2)))  # layers 1, 2; kv heads: distances matched
NUM_MATCHING = 2  # of the four query heads of a kv head


def text_config() -> LlamaConfig:
    """Five layers, two kv heads of 64: 2,560 bytes of KV a token in bf16."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def structured_model(seed: int) -> LlamaForCausalLM:
    """A float32 model of ``text_config`` with the weights described above."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(text_config()).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, NOISE_STD)
        codes = torch.randint(0, 2, (VOCAB_SIZE, P1)).float() * 2 - 1
        codes[:, CONST] = 1.0
        model.model.embed_tokens.weight[:, OWN:P1] = codes
        model.lm_head.weight[:, OUT : OUT + P1 - 1] += READ_GAIN * codes[:, 1:]
        _set_local_heads(model)
        for layer_idx, of_heads in enumerate(MATCHED, start=1):
            for kv_head, distances in enumerate(of_heads):
                _set_match_heads(model, layer_idx, kv_head, distances)
    return model


def _set_local_heads(model: LlamaForCausalLM) -> None:
    """Layer 0: query heads 0-3 and 4-7 look 1, 2, 3, 4 tokens back; the first three write."""
    config, attention = model.config, model.model.layers[0].self_attn
    head_size, half = config.head_dim, config.head_dim // 2
    pairs = torch.arange(NUM_LOCAL_PAIRS)
    speeds = ROPE_THETA ** (-pairs.float() / half)  # rad per token
    gain = LOCAL_GAIN / 2  # the embedding's rms is a half
    for kv_head in range(2):
        attention.k_proj.weight[kv_head * head_size + pairs, CONST] = gain
    rows = torch.arange(P1 - 1)
    attention.v_proj.weight[rows, 1 + rows] = 1.0
    for head in range(8):
        distance = 1 + head % 4
        rows = head * head_size + pairs
        attention.q_proj.weight[rows, CONST] = gain * torch.cos(speeds * distance)
        attention.q_proj.weight[rows + half, CONST] = -gain * torch.sin(speeds * distance)
    for head, (start, width) in LOCAL_WRITES.items():
        rows = torch.arange(width)
        attention.o_proj.weight[start + rows, head * head_size + rows] = 0.5


def _set_match_heads(
    model: LlamaForCausalLM, layer_idx: int, kv_head: int, distances: tuple[int, ...]
) -> None:
    """N-gram match in the slow rotary pairs, the matched token's code to OUT."""
    attention, head_size = model.model.layers[layer_idx].self_attn, model.config.head_dim
    heads = range(4 * kv_head, 4 * kv_head + NUM_MATCHING)
    slow = torch.arange(FIRST_SLOW_PAIR, head_size // 2)
    slow = torch.cat((slow, slow + head_size // 2))
    starts = (OWN + 1, P1, P2, P3)
    for distance in distances:
        width = CODE if distance < 3 else 32
        projection = torch.randn(len(slow), width) * MATCH_GAIN * (CODE / width) ** 0.5
        _add(attention.k_proj.weight, kv_head * head_size + slow, starts[distance], projection)
        for head in heads:
            _add(attention.q_proj.weight, head * head_size + slow, starts[distance - 1], projection)
    rows = torch.arange(P1 - 1)
    attention.v_proj.weight[kv_head * head_size + rows, 1 + rows] += 1.0
    for head in heads:
        attention.o_proj.weight[OUT + rows, head * head_size + rows] += WRITE_GAIN


def _add(weight: Tensor, rows: Tensor, start: int, block: Tensor) -> None:
    """Add ``block`` to ``weight`` at ``rows`` and the columns from ``start`` on."""
    weight[rows, start : start + block.shape[1]] += block
