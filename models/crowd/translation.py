"""models/shapes as a starting point for visual tokens in directions of their own.

Shapes: A attributes, E hidden size, W the hidden size of models/shapes.

models/shapes says an attribute in the same numbers of a word's embedding and of a visual token.
Here the hidden size is larger, and visual tokens say their attributes in the new numbers alone, by
a random orthogonal basis: the cosine of a word with a visual token is zero. What reads the residual
stream in the language model is given the translation (its columns for the old numbers, turned into
the basis), so the first weights answer as models/shapes does, nearly: a visual token's length after
a layer has written to it is another. Training may move all of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from structure import HIDDEN, NUM_ATTRIBUTES, shapes_config
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from vllm_covipal.evaluation.scenes import CROWD_WORLD

HIDDEN_SIZE = HIDDEN + NUM_ATTRIBUTES
NORM = (HIDDEN / HIDDEN_SIZE) ** 0.5  # RMSNorm of as much in more numbers gives more


def visual_basis() -> Tensor:
    """The visual tokens' direction of each attribute, orthonormal, no word has any. [A, E]."""
    generator = torch.Generator().manual_seed(20261124)
    turn = torch.linalg.qr(torch.randn(NUM_ATTRIBUTES, NUM_ATTRIBUTES, generator=generator)).Q
    return F.pad(turn, (HIDDEN, 0))


@torch.no_grad()
def translated(old: LlavaForConditionalGeneration, seed: int) -> LlavaForConditionalGeneration:
    """A float32 model of ``CROWD_WORLD`` that answers as ``old``, models/shapes, did."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(shapes_config(CROWD_WORLD, HIDDEN_SIZE)).float()
    model.generation_config.do_sample = False
    turn = visual_basis()[:, HIDDEN:]
    _copy_tower(old.model, model.model, turn)
    _copy_language_model(old.model.language_model, model.model.language_model, turn)
    model.lm_head.weight.zero_()[:, :HIDDEN] = old.lm_head.weight
    return model


def _copy_tower(old: torch.nn.Module, new: torch.nn.Module, turn: Tensor) -> None:
    """The tower, its places stretched to the larger picture; the projector, into ``turn``."""
    weights = old.vision_tower.state_dict()
    (key,) = (key for key in weights if key.endswith("position_embedding.weight"))
    places = weights[key]
    size, wanted = int((len(places) - 1) ** 0.5), CROWD_WORLD.num_columns
    grid = places[1:].T.reshape(1, -1, size, size)
    grid = F.interpolate(grid, (wanted, wanted), mode="bicubic", align_corners=True)
    weights[key] = torch.cat((places[:1], grid[0].flatten(1).T))
    new.vision_tower.load_state_dict(weights, strict=False)
    first, last = new.multi_modal_projector.linear_1, new.multi_modal_projector.linear_2
    old_first, old_last = old.multi_modal_projector.linear_1, old.multi_modal_projector.linear_2
    first.weight[:HIDDEN], first.bias.zero_()[:HIDDEN] = old_first.weight, old_first.bias
    last.weight.zero_()[HIDDEN:, :HIDDEN] = turn.T @ old_last.weight[:NUM_ATTRIBUTES]
    last.bias.zero_()[HIDDEN:] = turn.T @ old_last.bias[:NUM_ATTRIBUTES]


def _copy_language_model(old: torch.nn.Module, new: torch.nn.Module, turn: Tensor) -> None:
    new.embed_tokens.weight.zero_()[:, :HIDDEN] = old.embed_tokens.weight
    new.norm.weight.fill_(NORM)[:HIDDEN] *= old.norm.weight
    for old_layer, layer in zip(old.layers, new.layers, strict=True):
        for part, norm, readers, writer in (
            ("self_attn", "input_layernorm", ("q_proj", "k_proj", "v_proj"), "o_proj"),
            ("mlp", "post_attention_layernorm", ("gate_proj", "up_proj"), "down_proj"),
        ):
            gain = getattr(old_layer, norm).weight
            getattr(layer, norm).weight.fill_(NORM)[:HIDDEN] *= gain
            old_part, new_part = getattr(old_layer, part), getattr(layer, part)
            for reader in readers:
                weight = getattr(old_part, reader).weight
                own = weight[:, :NUM_ATTRIBUTES] * gain[:NUM_ATTRIBUTES]
                getattr(new_part, reader).weight.copy_(torch.cat((weight, own @ turn), dim=1))
            getattr(new_part, writer).weight.zero_()[:HIDDEN] = getattr(old_part, writer).weight
