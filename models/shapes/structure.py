"""Trainable starting points: codes that vision and language share, and heads that look things up.

Shapes: E hidden size of the language model, D head size.

Random weights stay at chance in the time this recipe has, so the first weights hold the mechanism
in rough form and training sharpens it. The residual stream of the language model is cut into parts:

- OWN: one row per attribute (colour, shape, letter, row, column, ...). A word has the row of what
  it means, a visual token the rows of what is in its cell.
- WORD: random signs that tell one word from another; visual tokens have none.
- ASK: words gathered by the last token, what is asked for.
- OBJECT: the attributes of things looked up; the output layer reads it together with ASK.

Layers: 0 adds the codes of the two words before to a word (heads whose rotary phase peaks at
distance 1 and 2), 1 matches OWN against the visual tokens' OWN in the slow rotary pairs and writes
what it finds to OBJECT, 2 gathers ASK and OBJECT over the question's words, 3 matches OBJECT
against the visual tokens again, 4 gathers again, 5 is free. Everything is trained afterwards,
nothing is frozen.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vllm_covipal.evaluation import scenes, shapes
from vllm_covipal.evaluation.scenes import (
    COLORS,
    LETTERS,
    SHAPES,
    SHAPES_WORLD,
    Scene,
    Thing,
    World,
)

NUM_ATTRIBUTES = 64
OWN, WORD, ASK, OBJECT = 0, 64, 96, 128  # first row of each part of the residual stream
HIDDEN = 192
COLOR, SHAPE, LETTER, ROW, COLUMN = 0, 8, 16, 34, 46  # first row of each attribute in OWN
DULL = 45  # a distractor; ROW reaches it in no world that has any
X, Y, IS_CENTRE, IS_VISUAL, IS_TEXT, IS_BOS = 58, 59, 60, 61, 62, 63
WORD_GAIN = 0.25
PART_RATIO = 0.25  # of a cell: what a thing must cover there to be coded besides its own cell
PART_CODE = 0.5

HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS = 64, 4, 2
NUM_FAST_PAIRS = 10
FIRST_SLOW_PAIR = 14  # turns 0.4 rad in 160 tokens at theta 1,000,000
NORMED = 6.5  # about what a code of 1 is after RMSNorm
LOCAL_GAIN = 9.2 / NORMED  # the next-nearest distance gets about e**-8
MATCH_GAIN = 1.3  # one matched attribute adds about 9 to a logit
NOISE_STD = 0.02

TOKEN_IDS = {token: i for i, token in enumerate(shapes.VOCAB)}


def shapes_config(world: World = SHAPES_WORLD, hidden_size: int = HIDDEN) -> LlavaConfig:
    """LLaVA-1.5 in small: CLIP tower of 3 layers, two-layer projector, Llama of 6 layers."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=world.image_pixels,
            patch_size=scenes.CELL_PIXELS,
            projection_dim=128,
            hidden_act="quick_gelu",
        ),
        text_config=LlamaConfig(
            vocab_size=len(shapes.VOCAB),
            hidden_size=hidden_size,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=NUM_HEADS,
            num_key_value_heads=NUM_KV_HEADS,
            head_dim=HEAD_SIZE,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
            tie_word_embeddings=False,
            rms_norm_eps=1e-5,
            pad_token_id=TOKEN_IDS[shapes.PAD],
            bos_token_id=TOKEN_IDS[shapes.BOS],
            eos_token_id=TOKEN_IDS[shapes.EOS],
        ),
        image_token_index=TOKEN_IDS[shapes.IMAGE],
        image_seq_length=world.num_cells,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        pad_token_id=TOKEN_IDS[shapes.PAD],
    )


@cache
def cell_codes(world: World = SHAPES_WORLD) -> np.ndarray:
    """The codes of an empty picture, [cells, NUM_ATTRIBUTES] float32: where each cell is."""
    cells = np.arange(world.num_cells)
    codes = np.zeros((world.num_cells, NUM_ATTRIBUTES), dtype=np.float32)
    rows, columns = np.divmod(cells, world.num_columns)
    codes[cells, ROW + rows // world.cells_per_place] = 1
    codes[cells, COLUMN + columns // world.cells_per_place] = 1
    middle = (world.num_columns - 1) / 2
    codes[:, X] = columns / middle - 1
    codes[:, Y] = rows / middle - 1
    codes[:, IS_VISUAL] = 1
    codes.flags.writeable = False
    return codes


_COLOR_IDX = {color: COLOR + i for i, color in enumerate(COLORS)}
_SHAPE_IDX = {shape: SHAPE + i for i, shape in enumerate(SHAPES)}
_LETTER_IDX = {letter: LETTER + i for i, letter in enumerate(LETTERS)}


def scene_codes(scene: Scene) -> np.ndarray:
    """What each visual token is to say of a scene, [cells, NUM_ATTRIBUTES] float32."""
    codes = cell_codes(scene.world).copy()
    for thing in (*scene.things, *scene.distractors):
        for cell, ratio in scenes.coverage(thing).items():
            if cell == thing.cell or ratio >= PART_RATIO:
                strength = 1.0 if cell == thing.cell else PART_CODE
                for row in _kind_rows(thing):
                    codes[cell, row] = strength
        codes[thing.cell, IS_CENTRE] = 1
        if thing.letter is not None:
            codes[thing.cell, [_LETTER_IDX[letter] for letter in thing.letter]] = 1
    return codes


def _kind_rows(thing: Thing) -> tuple[int, ...]:
    """Rows of its colour and shape; a distractor has one for both."""
    if thing.shape == scenes.DULL_SHAPE:
        return (DULL,)
    return _COLOR_IDX[thing.color], _SHAPE_IDX[thing.shape]


def attributes_of_words() -> dict[str, int]:
    """Word -> its row in OWN, for words that mean an attribute."""
    rows = dict(_COLOR_IDX) | dict(_SHAPE_IDX) | dict(_LETTER_IDX)
    rows |= {plural: _SHAPE_IDX[shape] for shape, plural in shapes.PLURALS.items()}
    rows |= {name: ROW + i for i, name in enumerate(shapes.ROW_NAMES)}
    return rows | {name: COLUMN + i for i, name in enumerate(shapes.COLUMN_NAMES)}


def structured_model(seed: int) -> LlavaForConditionalGeneration:
    """A float32 model of ``shapes_config`` with the weights described above."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(shapes_config()).float()
    model.generation_config.do_sample = False
    language_model = model.model.language_model
    with torch.no_grad():
        for parameter in language_model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, NOISE_STD)
        for layer in language_model.layers:
            layer.mlp.gate_proj.weight.normal_(0.0, HIDDEN**-0.5)
            layer.mlp.up_proj.weight.normal_(0.0, HIDDEN**-0.5)
            layer.mlp.down_proj.weight.normal_(0.0, NOISE_STD / 5)
        signs = _set_embeddings(language_model.embed_tokens.weight)
        _set_output(model.lm_head.weight, signs)
        layers = [layer.self_attn for layer in language_model.layers]
        _set_local_heads(layers[0])
        _set_match_heads(layers[1], query_from=OWN)
        _set_gather_heads(layers[2])
        _set_match_heads(layers[3], query_from=OBJECT)
        _set_gather_heads(layers[4])
    return model


def _set_embeddings(embedding: Tensor) -> Tensor:
    """Codes of the words; returns their random signs, [vocabulary, ASK - WORD]."""
    signs = torch.randint(0, 2, (len(shapes.VOCAB), ASK - WORD)).float() * 2 - 1
    embedding[:, WORD:ASK] = WORD_GAIN * signs
    embedding[:, IS_TEXT] += 1
    embedding[TOKEN_IDS[shapes.BOS], IS_BOS] += 1
    for word, row in attributes_of_words().items():
        embedding[TOKEN_IDS[word], row] += 1
    return signs


def _set_output(weight: Tensor, signs: Tensor) -> None:
    """The output layer: what OBJECT says, of the attribute that ASK names."""
    names = {COLOR: "color", SHAPE: "shape", LETTER: "letter", ROW: "row", COLUMN: "column"}
    plurals = set(shapes.PLURALS.values())
    for word, row in attributes_of_words().items():
        if word in plurals:
            continue
        start = max(first for first in names if first <= row)
        weight[TOKEN_IDS[word], OBJECT + row] += 0.7
        weight[TOKEN_IDS[word], ASK:OBJECT] += 0.1 * signs[TOKEN_IDS[names[start]]]


def _slow_rows(kv_head: int) -> Tensor:
    """Rows of a head in its slow rotary pairs."""
    slow = torch.arange(FIRST_SLOW_PAIR, HEAD_SIZE // 2)
    return kv_head * HEAD_SIZE + torch.cat((slow, slow + HEAD_SIZE // 2))


def _set_local_heads(attention: torch.nn.Module) -> None:
    """Query heads 0 and 1 of words look one and two back; visual tokens look at ``<s>``."""
    theta = attention.config.rope_parameters["rope_theta"]
    pairs = torch.arange(NUM_FAST_PAIRS)
    speeds = theta ** (-pairs.float() / (HEAD_SIZE // 2))  # rad per token
    attention.k_proj.weight[pairs, IS_TEXT] = LOCAL_GAIN
    attention.k_proj.weight[pairs, IS_VISUAL] = LOCAL_GAIN
    sink = int(_slow_rows(0)[0])
    attention.k_proj.weight[sink, IS_BOS] = MATCH_GAIN * 2
    copied = torch.arange(X)  # attributes that words have
    attention.v_proj.weight[copied, OWN + copied] = 0.4
    for head, distance in enumerate((1, 2)):
        rows = head * HEAD_SIZE + pairs
        attention.q_proj.weight[rows, IS_TEXT] = LOCAL_GAIN * torch.cos(speeds * distance)
        half = HEAD_SIZE // 2
        attention.q_proj.weight[rows + half, IS_TEXT] = -LOCAL_GAIN * torch.sin(speeds * distance)
        attention.q_proj.weight[head * HEAD_SIZE + sink, IS_VISUAL] = MATCH_GAIN * 2
        attention.o_proj.weight[OWN + copied, head * HEAD_SIZE + copied] = 0.4


def _set_match_heads(attention: torch.nn.Module, query_from: int) -> None:
    """Words look at the centre of the thing that has their attributes, and copy it to OBJECT.

    KV head 0 matches colour, shape and letter, KV head 1 row and column; ``query_from`` is the part
    of the residual stream that the query reads.
    """
    groups = (torch.arange(COLOR, ROW), torch.arange(ROW, X))
    copied = torch.arange(NUM_ATTRIBUTES)
    for kv_head, attributes in enumerate(groups):
        rows = _slow_rows(kv_head)
        matched, centre = rows[: len(attributes)], rows[-1]
        attention.k_proj.weight[matched, OWN + attributes] += MATCH_GAIN
        attention.k_proj.weight[centre, OWN + IS_CENTRE] += MATCH_GAIN
        attention.k_proj.weight[centre, OWN + IS_TEXT] -= MATCH_GAIN  # not itself
        attention.v_proj.weight[kv_head * HEAD_SIZE + copied, OWN + copied] += 0.4
        for head in (2 * kv_head, 2 * kv_head + 1):
            shift = (head - kv_head) * HEAD_SIZE
            attention.q_proj.weight[matched + shift, query_from + attributes] += MATCH_GAIN
            attention.q_proj.weight[centre + shift, OWN + IS_TEXT] += MATCH_GAIN
            attention.o_proj.weight[OBJECT + copied, head * HEAD_SIZE + copied] += 0.2


def _set_gather_heads(attention: torch.nn.Module) -> None:
    """Words look at the question's words: OBJECT from those with attributes, WORD from all."""
    attributes = torch.arange(X)
    for kv_head in range(NUM_KV_HEADS):
        row = int(_slow_rows(kv_head)[-1])
        attention.k_proj.weight[row, OWN + IS_TEXT] += MATCH_GAIN
        attention.k_proj.weight[row, OWN + IS_BOS] -= MATCH_GAIN
        attention.k_proj.weight[row, OWN + IS_VISUAL] -= MATCH_GAIN
        if kv_head == 0:
            attention.k_proj.weight[row, OWN + attributes] += MATCH_GAIN / 2
            copied, source, target, gain = torch.arange(NUM_ATTRIBUTES), OBJECT, OBJECT, 0.2
        else:
            copied, source, target, gain = torch.arange(ASK - WORD), WORD, ASK, 0.4
        attention.v_proj.weight[kv_head * HEAD_SIZE + copied, source + copied] += 0.4
        for head in (2 * kv_head, 2 * kv_head + 1):
            row_of_head = row + (head - kv_head) * HEAD_SIZE
            attention.q_proj.weight[row_of_head, OWN + IS_TEXT] += MATCH_GAIN
            attention.o_proj.weight[target + copied, head * HEAD_SIZE + copied] += gain
