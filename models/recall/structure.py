"""A trainable starting point that already looks up words, lists and lists of lists.

Shapes: E hidden size, D head size.

The idea is that of ``models/needle/structure.py``: the residual stream is cut into parts, the heads
of layer 0 copy earlier tokens' codes into them, and the heads above match parts of the query's
token with parts of the key's token under one random projection. Here it is multi-head attention
(no shared KV heads), and one part more: BEFORE, the value that a key had before, for keys with
several values.

- OWN: the token's code. P1, P2, P3: codes of the tokens one, two, three places before.
- OUT: what the output layer reads.
- Layer 1 finds, at ``key :``, what an earlier ``key :`` was followed by. A head of layer 2 copies
  that one place on, into BEFORE of the new value, with a flag that there was one. Layer 3 then
  matches the value just said with BEFORE: the next value of the list. Its look-up shuns the flag,
  so a list starts with its first value.

Everything is trained afterwards, nothing is frozen.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_spindle.evaluation.needle import ANSWER, IS, VOCAB

CODE = 40  # rows of OWN, P1, P2 and BEFORE
CONST, OWN, P1, P2, P3, BEFORE, OUT = 0, 1, 41, 81, 121, 153, 193  # first rows
P3_ROWS = 32
FOUND, LATER = OUT + 48, OUT + 49  # flags: a value was found; so this value is not a key's first
NUM_LOCAL_PAIRS = 16  # rotary pairs of the heads that look back, fastest first
FIRST_SLOW_PAIR = 20  # turns 0.56 rad in 2,048 tokens at theta 500,000
LOCAL_GAIN = 7.75  # next-nearest distance gets about e**-6
MATCH_GAIN = 0.22  # one matched word adds about 9 to a logit
BEFORE_GAIN = 3.0  # BEFORE is fainter than the other parts
FLAG_GAIN = 4.0
NOISE_STD = 0.02

STARTS = {"own": OWN, "p1": P1, "p2": P2, "p3": P3, "before": BEFORE}
LOOK_UP = (("own", "p1"), ("p1", "p2"))  # (part of the query's token, part of the key's token)
NEXT_KEY, AFTER_KEY = (("own", "p1"), ("p3", "p2")), (("p2", "p1"),)  # of several queries
# Per layer above 0, per head. None: the head looks one place back and copies OUT to BEFORE.
MATCHED = (
    (LOOK_UP, (*LOOK_UP, ("p2", "p3")), NEXT_KEY, AFTER_KEY),
    (LOOK_UP, None, NEXT_KEY, AFTER_KEY),
    (LOOK_UP, (("p1", "before"),), (("own", "before"),), (*LOOK_UP, ("p2", "p3"))),
)


def recall_config() -> LlamaConfig:
    """Four layers of four heads of 64, each with keys of its own: 4,096 bytes a token in bf16."""
    return LlamaConfig(
        vocab_size=len(VOCAB),
        hidden_size=256,
        intermediate_size=320,
        num_hidden_layers=1 + len(MATCHED),
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dialect="recall",  # what `vllm-spindle eval` asks it
    )


def structured_model(seed: int) -> LlamaForCausalLM:
    """A float32 model of ``recall_config`` with the weights described above."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(recall_config()).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, NOISE_STD)
        _set_codes(model)
        for head, (start, width) in enumerate(((P1, CODE), (P2, CODE), (P3, P3_ROWS))):
            _look_back(model, 0, head, 1 + head)
            _copy(model, 0, head, OWN, start, width, 0.5)
        _look_back(model, 0, 3, 1)
        for layer_idx, heads in enumerate(MATCHED, start=1):
            for head, matched in enumerate(heads):
                if matched is None:
                    _look_back(model, layer_idx, head, 1)
                    _copy(model, layer_idx, head, OUT, BEFORE, CODE, 1.0)
                    _copy_row(model, layer_idx, head, FOUND, LATER, 1.0)
                else:
                    _match(model, layer_idx, head, matched)
                    # A value that has a next one is followed by what stands before that: ":".
                    source = P1 if matched == (("own", "before"),) else OWN
                    _copy(model, layer_idx, head, source, OUT, CODE, 0.25)
        _flag_found(model, 1, 0)
        _shun_later(model, 3, 0)
    return model


def _set_codes(model: LlamaForCausalLM) -> None:
    """Random signs as token codes; the output layer reads the same codes from OUT."""
    codes = torch.randint(0, 2, (len(VOCAB), CODE)).float() * 2 - 1
    # "=" and ":" differ in a quarter of the rows: a look-up matches both, the rest is for telling.
    shared = 3 * CODE // 4
    codes[VOCAB.index(ANSWER), :shared] = codes[VOCAB.index(IS), :shared]
    model.model.embed_tokens.weight[:, CONST] = 1.0
    model.model.embed_tokens.weight[:, OWN : OWN + CODE] = codes
    model.lm_head.weight[:, OUT : OUT + CODE] += 0.12 * codes


def _look_back(model: LlamaForCausalLM, layer_idx: int, head: int, distance: int) -> None:
    """Queries and keys of a head that looks ``distance`` places back, whatever stands there."""
    config, attention = model.config, model.model.layers[layer_idx].self_attn
    head_size, half = config.head_dim, config.head_dim // 2
    pairs = torch.arange(NUM_LOCAL_PAIRS)
    speeds = config.rope_parameters["rope_theta"] ** (-pairs.float() / half)  # rad per token
    gain = LOCAL_GAIN / 2.4 if layer_idx == 0 else LOCAL_GAIN / 1.2  # the norm shrinks CONST above
    rows = head * head_size + pairs
    attention.k_proj.weight[rows, CONST] = gain
    attention.q_proj.weight[rows, CONST] = gain * torch.cos(speeds * distance)
    attention.q_proj.weight[rows + half, CONST] = -gain * torch.sin(speeds * distance)


def _match(model: LlamaForCausalLM, layer_idx: int, head: int, matched: tuple) -> None:
    """Queries and keys of a head that finds equal codes, in the slow rotary pairs."""
    attention = model.model.layers[layer_idx].self_attn
    head_size = model.config.head_dim
    slow = torch.arange(FIRST_SLOW_PAIR, head_size // 2)
    rows = head * head_size + torch.cat((slow, slow + head_size // 2))
    for of_query, of_key in matched:
        width = P3_ROWS if "p3" in (of_query, of_key) else CODE
        projection = torch.randn(len(rows), width) * MATCH_GAIN * (48 / width) ** 0.5
        gain = BEFORE_GAIN if of_key == "before" else 1.0
        _add(attention.k_proj.weight, rows, STARTS[of_key], gain * projection)
        _add(attention.q_proj.weight, rows, STARTS[of_query], projection)


def _copy(
    model: LlamaForCausalLM,
    layer_idx: int,
    head: int,
    source: int,
    target: int,
    width: int,
    gain: float,
) -> None:
    """Values and output of a head that writes ``width`` rows of what it sees elsewhere."""
    attention, head_size = model.model.layers[layer_idx].self_attn, model.config.head_dim
    rows = torch.arange(width)
    attention.v_proj.weight[head * head_size + rows, source + rows] += 1.0
    attention.o_proj.weight[target + rows, head * head_size + rows] += gain


def _copy_row(
    model: LlamaForCausalLM, layer_idx: int, head: int, source: int, target: int, gain: float
) -> None:
    """One row more, through the last value row of the head."""
    attention, head_size = model.model.layers[layer_idx].self_attn, model.config.head_dim
    row = (head + 1) * head_size - 1
    attention.v_proj.weight[row, source] += 1.0
    attention.o_proj.weight[target, row] += gain


def _flag_found(model: LlamaForCausalLM, layer_idx: int, head: int) -> None:
    """The head writes FOUND where what it sees stands after ``:``."""
    attention, head_size = model.model.layers[layer_idx].self_attn, model.config.head_dim
    row = (head + 1) * head_size - 1
    is_code = model.model.embed_tokens.weight[VOCAB.index(IS), OWN : OWN + CODE]
    attention.v_proj.weight[row, P1 : P1 + CODE] += is_code / CODE
    attention.o_proj.weight[FOUND, row] += 1.0


def _shun_later(model: LlamaForCausalLM, layer_idx: int, head: int) -> None:
    """The head sees less of what is flagged LATER."""
    attention, head_size = model.model.layers[layer_idx].self_attn, model.config.head_dim
    row = (head + 1) * head_size - 1  # of the slowest pair
    attention.q_proj.weight[row, CONST] += FLAG_GAIN
    attention.k_proj.weight[row, LATER] -= FLAG_GAIN


def _add(weight: Tensor, rows: Tensor, start: int, block: Tensor) -> None:
    """Add ``block`` to ``weight`` at ``rows`` and the columns from ``start`` on."""
    weight[rows, start : start + block.shape[1]] += block
