"""SpindleKV in transformers: the tokens and codebooks that the engine keeps, without a server.

    enable(model)
    cache = SpindleCache(model.config, SpindleConfig(keep_ratio=0.25))
    model.generate(input_ids, past_key_values=cache)

The prompt is read whole and reduced at its end; what follows, answers and further questions, is
kept. The engine's twin in tests, and the way to a reduced cache where there is no server. One
prompt at a time.

Or by any method of ``baselines``, two passes over the prompt included, for questions to come:

    cache = compress(model, document_ids, make_method("two_pass"), byte_ratio=0.25)
    model.generate(torch.cat([document_ids, question_ids], dim=1), past_key_values=cache)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_spindle.baselines.base import NUM_FUTURE, Method, PromptLayer
from vllm_spindle.baselines.spindle import DEFAULT_BLOCK_SIZE, make_policy, reduce_by_plan
from vllm_spindle.calibration.capture import rotary_table
from vllm_spindle.config import SpindleConfig, with_profile
from vllm_spindle.hf_layers import QueryCache, QueryLayer, enable

__all__ = ["SpindleCache", "compress", "enable", "read", "reduce_read"]


@torch.inference_mode()
def compress(model: Any, input_ids: Tensor, method: Method, byte_ratio: float) -> QueryCache:
    """A cache that holds a prompt, read and then reduced.

    Args:
        model: one that passed ``enable``.
        input_ids: the prompt. [1, P].
        method: of ``baselines.make_method``; one that reads twice costs a second prefill.
        byte_ratio: share of the prompt's true bytes, (0, 1].

    Raises:
        ValueError: if the method cannot reduce this model or prompt.
    """
    layers = read(model, input_ids, twice=method.reads_twice, ahead=method.reads_ahead)
    return reduce_read(model, layers, method, byte_ratio)


@torch.inference_mode()
def read(
    model: Any, input_ids: Tensor, *, twice: bool = False, ahead: int = 0
) -> list[PromptLayer]:
    """What each layer sees of a prompt, for ``reduce_read``: by several methods, if need be.

    Args:
        model: one that passed ``enable``.
        input_ids: the prompt. [1, P].
        twice: for methods that read twice, a second time behind itself.
        ahead: for methods that read ahead, most greedy tokens of its answer.

    Raises:
        ValueError: if asked for both.
    """
    if twice and ahead:
        raise ValueError(
            f"reduce_after={ahead}: what is read twice has been asked everything; use one of them"
        )
    cache = QueryCache(model.config)

    def feed(token_ids: Tensor) -> Tensor:
        out = model(input_ids=token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(-1)

    num_tokens, num_ahead = input_ids.shape[1], 0
    answer = feed(input_ids)
    if twice:
        feed(input_ids)
    while num_ahead < ahead and int(answer) not in stop_ids(model):
        answer = feed(answer)
        num_ahead += 1
    cos_sin = _rotary_table(model, num_tokens + NUM_FUTURE)
    return cache.prompt(cos_sin, num_tokens if twice else 0, num_ahead)


def stop_ids(model: Any) -> set[int]:
    """Tokens that end a text, by the model's own configuration."""
    found = model.generation_config.eos_token_id
    return {*(found if isinstance(found, list) else [found])} - {None}


@torch.inference_mode()
def reduce_read(
    model: Any, layers: Sequence[PromptLayer], method: Method, byte_ratio: float
) -> QueryCache:
    """A cache that holds a prompt that was read, reduced; ``layers`` stay as they are."""
    cache = QueryCache(model.config)
    for own, layer in zip(cache.layers, layers, strict=True):
        own.load(layer)
    cache.reduce(method.reduce(layers, byte_ratio))
    return cache


def _rotary_table(model: Any, num_positions: int) -> Tensor | None:
    config = model.config.get_text_config(decoder=True)
    head_size = getattr(config, "head_dim", None)
    try:
        return rotary_table(
            model, num_positions, head_size or config.hidden_size // config.num_attention_heads
        )
    except ValueError:
        return None  # who needs one says so


class SpindleCache(QueryCache):
    """A transformers cache that SpindleKV reduces once the prompt has been read.

    Positions go on from the prompt's true length, whatever is left of it.
    """

    def __init__(
        self,
        config: Any,
        options: SpindleConfig,
        *,
        prompt_len: int | None = None,
        block_size: int = DEFAULT_BLOCK_SIZE,
        cos_sin: Tensor | None = None,
    ) -> None:
        """An empty cache.

        Args:
            config: of a model that passed ``enable``.
            options: the engine's dials.
            prompt_len: tokens to reduce, which may come in chunks; None for all of the first call.
            block_size: tokens per block: the budget is whole blocks, as in the engine.
            cos_sin: rotary table of the prompt's positions, see ``core/rotary.py``; a codebook
                needs it, eviction does not. [P, D].

        Raises:
            ValueError: if the model's attention does not pass through ours, or a codebook lacks
                its table.
        """
        if options.merges and cos_sin is None:
            raise ValueError("a codebook needs cos_sin; see calibration.capture.rotary_table")
        self._options = with_profile(options, config._name_or_path)
        self._prompt_len = prompt_len
        self._block_size, self._cos_sin = block_size, cos_sin
        self._num_layers = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(config)

    def make_layer(self, layer_idx: int) -> QueryLayer:
        return _SpindleLayer(self, layer_idx)

    def reduce_layer(self, layer_idx: int) -> None:
        """Reduce one layer if its prompt is there, and what is to be waited for behind it."""
        layer: QueryLayer = self.layers[layer_idx]
        num_ahead = self._options.reduce_after
        if layer.num_seen < (self._prompt_len or layer.first_call_len) + num_ahead:
            return
        prompt = layer.prompt(layer_idx, self._cos_sin, num_ahead=num_ahead)
        policy = make_policy(self._options, self._block_size, self._num_layers, prompt.queries)
        band = policy.band_of_layer(layer_idx)
        plan = policy.plan(prompt.num_tokens)[band]
        layer.reduce(reduce_by_plan(policy, band, plan, prompt), num_ahead)


class _SpindleLayer(QueryLayer):
    """Tells its cache when the newest tokens have been attended."""

    def __init__(self, cache: SpindleCache, layer_idx: int) -> None:
        super().__init__()
        self._cache, self._layer_idx = cache, layer_idx

    def attended(self) -> None:
        self._cache.reduce_layer(self._layer_idx)
