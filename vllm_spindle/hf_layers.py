"""The seam to transformers: cache layers that see queries, and attend over what is left.

transformers hands keys and values to a cache, and queries to the attention function alone. So a
layer of ours marks the keys that it returns, and an attention function of ours, registered under a
name of its own, passes calls with marked keys to their layer; all others get torch's attention as
ever. One prompt at a time, no padding, no beams.

Shapes: K kv heads, G query heads per kv head, H = K * G, T tokens so far, Q new tokens, D head
size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vllm_spindle.baselines.base import PromptLayer, ReducedLayer
from vllm_spindle.calibration.attention import attend
from vllm_spindle.core.codebook_bytes import dense_bytes

ATTENTION = "spindle"
_LAYER = "spindle_layer"  # attribute of a keys tensor that a layer of ours returns


def enable(model: Any) -> None:
    """Let a model's attention pass through ours; with other caches it is torch's SDPA.

    The same as loading it with ``attn_implementation="spindle"`` once this has been called.

    Raises:
        ValueError: if the model does not take attention functions from the outside.
    """
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
    require_enabled(model.config)


def require_enabled(config: Any) -> None:
    """Refuse a model whose attention would not see what a cache of ours reduced.

    Raises:
        ValueError: if ``enable`` was not called.
    """
    found = config.get_text_config(decoder=True)._attn_implementation
    if found != ATTENTION:
        raise ValueError(
            f"attn_implementation={found!r}: a reduced cache needs {ATTENTION!r}; call "
            "vllm_spindle.hf.enable(model) first"
        )


class QueryLayer(DynamicLayer):
    """Keys and values as ever until ``reduce``; from then on what is left, and a dense tail.

    Attributes:
        num_seen: tokens so far, evicted ones included: the position of the next.
        reduced: what is left of the prompt, or None.
        full_bytes: of the prompt before; None as long as nothing is reduced.
    """

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.num_seen = 0
        self.reduced: ReducedLayer | None = None
        self.full_bytes: int | None = None
        self._scale = 0.0
        self._queries: list[Tensor] | None = []
        self._context: tuple[Tensor, Tensor, Tensor] | None = None
        self._waits = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if key_states.shape[0] != 1:
            raise ValueError(f"one prompt at a time, got a batch of {key_states.shape[0]}")
        if self._waits:
            raise RuntimeError(
                "the model's attention does not pass through vllm_spindle.hf; call "
                "vllm_spindle.hf.enable(model) first"
            )
        keys, values = super().update(key_states, value_states)
        self.num_seen += key_states.shape[-2]
        self._waits = True
        keys = keys.view(keys.shape)  # a tensor of our own to mark
        setattr(keys, _LAYER, self)
        return keys, values

    def get_seq_length(self) -> int:
        return self.num_seen

    @property
    def first_call_len(self) -> int:
        """Tokens of the first call, of a layer that has not been reduced."""
        assert self._queries is not None
        return self._queries[0].shape[2]

    def attend(self, query: Tensor, attention_mask: Tensor | None, scale: float) -> Tensor | None:
        """Outputs of the newest tokens over what is left; None where nothing is reduced.

        Args:
            query: rotated. [1, H, Q, D].
            attention_mask: as transformers made it; what it hides must be the future alone.
            scale: softmax scale.

        Returns:
            [1, Q, H, D].
        """
        self._waits, self._scale = False, scale
        if self._queries is not None:
            self._queries.append(query)
        if self.reduced is None:
            return None
        _refuse_padding(attention_mask, query.shape[2])
        assert self._context is not None
        stored = self._context[0].shape[0]
        copies = stored // self.keys.shape[1]
        outputs = attend(
            query[0].view(stored, -1, *query.shape[2:]),
            *self._context,
            self.keys[0].repeat_interleave(copies, 0),
            self.values[0].repeat_interleave(copies, 0),
            scale,
        )
        return outputs.flatten(0, 1).transpose(0, 1).unsqueeze(0).to(query.dtype)

    def attended(self) -> None:
        """Called once the newest tokens were attended with nothing reduced."""

    def prompt(
        self, layer_idx: int, cos_sin: Tensor | None, num_repeated: int = 0, num_ahead: int = 0
    ) -> PromptLayer:
        """What the layer saw, to be reduced; queries are no longer recorded.

        Args:
            layer_idx: depth.
            cos_sin: see ``PromptLayer``.
            num_repeated: newest tokens that repeat the prompt's last ones; they are left out, and
                their queries kept apart.
            num_ahead: likewise, newest tokens that answer the prompt. Not both.
        """
        assert self._queries is not None
        num_apart = num_repeated + num_ahead
        num_tokens = self.num_seen - num_apart
        queries = torch.cat(self._queries, dim=2)[0]
        self._queries = None
        queries = queries.view(self.keys.shape[1], -1, *queries.shape[1:])
        return PromptLayer(
            queries=queries[:, :, :num_tokens],
            keys=self.keys[0, :, :num_tokens],
            values=self.values[0, :, :num_tokens],
            scale=self._scale,
            layer_idx=layer_idx,
            cos_sin=cos_sin,
            repeated=queries[:, :, num_tokens:] if num_repeated else None,
            ahead=queries[:, :, num_tokens:] if num_ahead else None,
        )

    def reduce(self, reduced: ReducedLayer, num_ahead: int = 0) -> None:
        """Hold what is left of the prompt, and no longer the rest.

        Args:
            reduced: what is left.
            num_ahead: newest tokens that are not the prompt's; they stay.
        """
        self.reduced, self._queries = reduced, None
        prompt_len = self.num_seen - num_ahead
        self.full_bytes = dense_bytes(self.keys.shape[1] * prompt_len, self.keys.shape[-1])
        # attend() reads float32: turned once, not at every step.
        self._context = (reduced.keys.float(), reduced.values.float(), reduced.is_there)
        self.keys = self.keys[:, :, reduced.num_context :].clone()
        self.values = self.values[:, :, reduced.num_context :].clone()

    def load(self, layer: PromptLayer) -> None:
        """Hold a prompt that another cache has read."""
        self.reset()
        keys, values = layer.keys.unsqueeze(0), layer.values.unsqueeze(0)
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.num_seen = keys, values, layer.num_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest ``-tokens_to_remove`` tokens, all of which must be dense.

        Raises:
            ValueError: if that many are not dense.
        """
        num_dense = self.keys.shape[-2]
        if not -num_dense <= tokens_to_remove <= 0:
            raise ValueError(
                f"crop({tokens_to_remove}): only the last {num_dense} tokens are dense"
            )
        if tokens_to_remove:
            self.keys = self.keys[..., :tokens_to_remove, :]
            self.values = self.values[..., :tokens_to_remove, :]
            self.num_seen += tokens_to_remove

    def reset(self) -> None:
        super().reset()
        self.num_seen, self.reduced, self._context, self.full_bytes = 0, None, None, None
        self._queries, self._waits = [], False


class QueryCache(Cache):
    """A cache of ``QueryLayer``; reduced when told to. ``hf.SpindleCache`` tells itself."""

    def __init__(self, config: Any) -> None:
        """An empty cache. config: of a model that passed ``enable``."""
        require_enabled(config)
        text_config = config.get_text_config(decoder=True)
        if getattr(text_config, "sliding_window", None) is not None:
            raise ValueError(
                "sliding-window attention is not supported: its cache is small already"
            )
        super().__init__(layers=[self.make_layer(i) for i in range(text_config.num_hidden_layers)])

    def make_layer(self, layer_idx: int) -> QueryLayer:
        """The layer of a depth."""
        return QueryLayer()

    def prompt(
        self, cos_sin: Tensor | None, num_repeated: int = 0, num_ahead: int = 0
    ) -> list[PromptLayer]:
        """What every layer saw; see ``QueryLayer.prompt``."""
        return [
            layer.prompt(layer_idx, cos_sin, num_repeated, num_ahead)
            for layer_idx, layer in enumerate(self.layers)
        ]

    def reduce(self, reduced: Sequence[ReducedLayer]) -> None:
        """Hold what is left of each layer."""
        for layer, left in zip(self.layers, reduced, strict=True):
            layer.reduce(left)

    @property
    def full_bytes(self) -> int | None:
        """Bytes of the prompt, nothing reduced; None before it is reduced."""
        layers = [layer.full_bytes for layer in self.layers]
        return None if None in layers else sum(layers)

    @property
    def true_bytes(self) -> int | None:
        """Bytes of the reduced prompt over all layers; None before it is reduced."""
        reduced = [layer.reduced for layer in self.layers]
        return None if None in reduced else sum(left.num_bytes for left in reduced)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function that transformers calls. query: [1, H, Q, D]."""
    layer: QueryLayer | None = getattr(key, _LAYER, None)
    if layer is not None:
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        outputs = layer.attend(query, attention_mask, scale)
        if outputs is not None:
            return outputs, None
    outputs = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if layer is not None:
        layer.attended()
    return outputs


def _refuse_padding(attention_mask: Tensor | None, num_queries: int) -> None:
    """The newest token sees everything, or there is padding."""
    if attention_mask is not None and not bool(attention_mask[..., -1, :].all()):
        raise ValueError("a reduced cache takes prompts without padding")
