"""What fixes the embeddings that a pruning module reads, as sixteen hex digits.

Two models of one fingerprint have embeddings of one shape, made by layers of one geometry. It
tells families and sizes apart, not two fine-tunes of one model.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

TEXT_KEYS = ("hidden_size", "num_hidden_layers", "vocab_size")

# Families differ in the names; the first one present counts.
VISION_KEYS = {
    "width": ("embed_dim", "hidden_size"),
    "depth": ("depth", "num_hidden_layers"),
    "patch_size": ("patch_size",),
    "image_size": ("image_size",),
    "spatial_merge_size": ("spatial_merge_size",),
    "temporal_patch_size": ("temporal_patch_size",),
}
PROJECTED_KEYS = ("vision_feature_layer", "vision_feature_select_strategy")


def fingerprint(hf_config: Any) -> str:
    """The fingerprint of an LVLM.

    Args:
        hf_config: a transformers configuration, or its ``to_dict()``. Not a raw config.json: that
            leaves out what equals a default.

    Returns:
        16 hex digits, the same wherever the configuration was loaded.

    Raises:
        ValueError: if there is no text width or no vision configuration in it.
    """
    config: Mapping[str, Any] = hf_config if isinstance(hf_config, Mapping) else hf_config.to_dict()
    text = config.get("text_config") or config
    vision = config.get("vision_config")
    model_type = config.get("model_type")
    if not vision or text.get("hidden_size") is None:
        raise ValueError(f"{model_type!r} is no vision-language configuration")
    parts = {
        "model_type": model_type,
        "text": {key: text.get(key) for key in TEXT_KEYS},
        "vision": {
            name: next((vision[key] for key in keys if vision.get(key) is not None), None)
            for name, keys in VISION_KEYS.items()
        },
        "projected": {key: config.get(key) for key in PROJECTED_KEYS},
    }
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
