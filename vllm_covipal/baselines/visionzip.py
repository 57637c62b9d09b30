"""VisionZip: the tower's dominant tokens, and what is left merged into a few.

Shapes: N patches, W width of the tower, H heads, S head size.
Method: VisionZip (arXiv:2412.04467). Dominant: most attended to by the class token, summed over
heads, in the layer whose output is projected. Of the others every (rest / c)-th is a target; each
of the rest goes to the target with the most similar keys (mean over heads, cosine), and a target
takes the mean of what came to it on top of itself. Proportion of the two: 54 to 10, as in the
release's example. The class token itself is not passed on: LLaVA drops it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_covipal.baselines.pooling import with_rows
from vllm_covipal.core.budget import kept_tokens
from vllm_covipal.hf import EncodedPrompt, PrunedPrompt
from vllm_covipal.hf_attention import attention_of_layer
from vllm_covipal.selectors.base import top_places

CONTEXTUAL_SHARE = 10 / 64


@torch.no_grad()
def prune_prompt(model: Any, encoded: EncodedPrompt, keep_ratio: float) -> PrunedPrompt:
    """The prompt with the picture's rows zipped.

    Raises:
        ValueError: for anything but LLaVA-1.5 with a CLIP tower.
    """
    if model.config.model_type != "llava" or model.config.vision_config.model_type[:4] != "clip":
        raise ValueError("visionzip here takes LLaVA-1.5 with a CLIP tower")
    hidden, attention, keys = _tower(model, encoded.inputs["pixel_values"])
    num_kept = kept_tokens(len(hidden), keep_ratio)
    if num_kept == len(hidden):
        zipped = hidden
    else:
        num_contextual = min(round(num_kept * CONTEXTUAL_SHARE), num_kept - 1)
        zipped = zip_tokens(hidden, attention, keys, num_kept - num_contextual, num_contextual)
    return with_rows(model, encoded, model.model.multi_modal_projector(zipped[None])[0])


def zip_tokens(
    hidden: Tensor, attention: Tensor, keys: Tensor, num_dominant: int, num_contextual: int
) -> Tensor:
    """Dominant and contextual tokens, in the order of the picture.

    Args:
        hidden: the tower's output. [N, W].
        attention: of the class token. [N].
        keys: mean over heads. [N, S].
        num_dominant: tokens that stay as they are.
        num_contextual: targets.

    Returns:
        [num_dominant + num_contextual, W].
    """
    dominant = top_places(attention, num_dominant)
    is_left = torch.ones(len(hidden), dtype=torch.bool)
    is_left[dominant] = False
    left = is_left.nonzero().squeeze(1)
    if not num_contextual:
        return hidden[dominant.sort().values]
    step = max(1, len(left) // num_contextual)
    targets = left[::step][:num_contextual]
    is_left[targets] = False
    merged = is_left.nonzero().squeeze(1)
    unit = F.normalize(keys.float(), dim=-1)
    nearest = (unit[merged] @ unit[targets].T).argmax(1)
    sums = hidden.new_zeros(len(targets), hidden.shape[1]).index_add(0, nearest, hidden[merged])
    counts = torch.bincount(nearest, minlength=len(targets)).clamp(min=1)
    out = hidden.clone()
    out[targets] = hidden[targets] + sums / counts[:, None]
    return out[torch.cat([dominant, targets]).sort().values]


def _tower(model: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output [N, W], class token's attention [N], keys [N, S] of the layer that is projected."""
    tower, number = model.model.vision_tower, model.config.vision_feature_layer
    layers = getattr(tower, "vision_model", tower).encoder.layers
    layer = layers[number if number < 0 else number - 1]
    seen: list[tuple[Tensor, Tensor]] = []

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        weights = (query @ key.mT * scale).softmax(-1)
        seen.append((weights[0, :, 0, 1:].sum(0), key[0, :, 1:].mean(0)))
        return (weights @ value).transpose(1, 2), None

    with attention_of_layer(layer.self_attn, attend):
        states = tower(pixel_values.to(model.dtype), output_hidden_states=True).hidden_states
    ((attention, keys),) = seen
    return states[number][0, 1:], attention, keys
