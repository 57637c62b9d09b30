"""vLLM's own processor of each family, with fewer placeholders for pruned items.

The count is integer arithmetic on what the stock processor would have written. Which text the
choice may read is settled here too, because the processor cache, the encoder cache and the prefix
cache key an item by its hash: the ratio, the text and the selector must all be in it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.multimodal.processing import PromptUpdate, PromptUpdateDetails

from vllm_covipal.config import KEEP_RATIO_KEY
from vllm_covipal.core.budget import kept_rows
from vllm_covipal.core.text_context import special_ids, text_context, turn_end_sequences
from vllm_covipal.engine.families import Family
from vllm_covipal.engine.metrics import count_tokens
from vllm_covipal.engine.options import Options, attached, take_keep_ratio, take_template
from vllm_covipal.engine.request_fields import PruningRequest, field_configs, pack
from vllm_covipal.selectors import uses_text

NUM_TEMPLATES = 16
"""Chat templates whose ends of turns are remembered: the server's, and those of trusted clients."""
REQUESTS_KEY = "covipal_requests"
"""Where one ``apply`` keeps its requests among the processor arguments; no caller may set it."""

Requests = Mapping[str, Sequence[PruningRequest]]


def pruning_factory(stock: Callable[..., Any], family: Family) -> Callable[..., Any]:
    """A processor factory whose processors prune.

    Args:
        stock: vLLM's factory: a class, or a function that picks one by the model.
        family: of the model.
    """

    def make(info: Any, dummy_inputs: Any) -> Any:
        stock_class = type(stock(info, dummy_inputs))
        return _pruning_class(stock_class)(info, dummy_inputs, family)

    return make


@cache
def _pruning_class(stock_class: type) -> type:
    return type(f"Pruning{stock_class.__name__}", (PruningProcessorMixin, stock_class), {})


class PruningProcessorMixin:
    """Shrinks placeholders. Off, or for a request at ratio 1.0, every call is the stock one."""

    def __init__(self, info: Any, dummy_inputs: Any, family: Family) -> None:
        """As vLLM's processors, and the model's family."""
        super().__init__(info, dummy_inputs)  # type: ignore[call-arg]
        self._family = family
        self._options: Options | None = attached(info.ctx.model_config)
        self._texts = _TextContexts(info, family, self._options) if self._options else None

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Unpruned: a request may ask for all tokens, and memory must hold them."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        if self._options is not None:
            inputs.hf_processor_mm_kwargs = {KEEP_RATIO_KEY: 1.0}
        return inputs

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process one prompt; its pruned items get fewer placeholders.

        The result carries the ratio that was used, for ``options.check_request``.

        Raises:
            VLLMValidationError: HTTP 400, for a bad ratio or option of this request.
        """
        if self._options is None:
            return super().apply(inputs, timing_ctx)  # type: ignore[misc]
        keep_ratio, kwargs = take_keep_ratio(
            inputs.hf_processor_mm_kwargs, self._options.config.keep_ratio
        )
        template, kwargs = take_template(kwargs)
        inputs = dataclasses.replace(inputs, hf_processor_mm_kwargs=kwargs)
        if keep_ratio == 1 or not any(inputs.mm_data_items.get_all_counts().values()):
            return {**super().apply(inputs, timing_ctx), KEEP_RATIO_KEY: 1.0}  # type: ignore[misc]
        _refuse_embeddings(inputs.mm_data_items)
        requests = self._requests(inputs, keep_ratio, template)
        inputs.hf_processor_mm_kwargs = {**kwargs, REQUESTS_KEY: requests}
        result = super().apply(inputs, timing_ctx)  # type: ignore[misc]
        self._family.check_placeholders(
            self.info.get_hf_config(),  # type: ignore[attr-defined]
            result["prompt_token_ids"],
            result["mm_placeholders"],
        )
        return {**result, KEEP_RATIO_KEY: keep_ratio}

    def _requests(self, inputs: Any, keep_ratio: float, template: str | None) -> Requests:
        hashes = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        counts = {m: len(h) for m, h in hashes.items()}
        texts = self._texts.of_prompt(inputs.prompt, counts, template)
        return {
            modality: [
                PruningRequest(keep_ratio, text, media_hash)
                for text, media_hash in zip(texts[modality], of_modality, strict=True)
            ]
            for modality, of_modality in hashes.items()
        }

    def _get_mm_hashes(self, inputs: Any) -> Any:
        requests, _ = _take_requests(inputs.hf_processor_mm_kwargs)
        if requests is None:
            return super()._get_mm_hashes(inputs)  # type: ignore[misc]
        identity = self._options.identity
        return {m: [r.cache_hash(identity) for r in items] for m, items in requests.items()}

    def _get_cache_missing_items(self, cache: Any, mm_data_items: Any, mm_hashes: Any) -> Any:
        for modality, hashes in mm_hashes.items():
            of_modality = mm_data_items[modality]
            absent = [i for i in range(len(of_modality)) if of_modality[i] is None]
            if absent and not all(cache.is_cached([hashes[i] for i in absent])):
                raise VLLMValidationError(
                    f"{modality}: what came by its UUID alone is not known for this question and "
                    f"{KEEP_RATIO_KEY}, which its tokens are chosen for: send it again"
                )
        return super()._get_cache_missing_items(cache, mm_data_items, mm_hashes)  # type: ignore[misc]

    def _get_cache_missing_processor_kwargs(
        self, inputs: Any, mm_is_cached: Mapping[str, Sequence[bool]]
    ) -> Mapping[str, object]:
        kwargs = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)  # type: ignore[misc]
        requests, rest = _take_requests(kwargs)
        if requests is None:
            return kwargs
        missing = {
            modality: [r for r, hit in zip(items, mm_is_cached[modality], strict=True) if not hit]
            for modality, items in requests.items()
        }
        return {**rest, REQUESTS_KEY: missing}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        requests, rest = _take_requests(hf_kwargs)
        data = super()._apply_hf_processor_main(mm_items, rest)  # type: ignore[misc]
        for modality, items in (requests or {}).items():
            if items:
                data.update(pack(modality, items))
        return data

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, Any]:
        requests, rest = _take_requests(hf_processor_mm_kwargs)
        configs = dict(super()._get_mm_fields_config(hf_inputs, rest))  # type: ignore[misc]
        for modality in requests or ():
            configs.update(field_configs(modality))
        return configs

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        requests, rest = _take_requests(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, rest, out_mm_kwargs)  # type: ignore[misc]
        if requests is None:
            return updates
        return [
            self._shrunk(update, mm_items, requests[update.modality])
            if update.modality in requests
            else update
            for update in updates
        ]

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        contents = [
            update.content
            for items in mm_res.prompt_updates.values()
            for updates in items
            for update in updates
            if isinstance(update.content, PrunedContent)
        ]
        if contents:
            count_tokens(
                self.info.ctx.model_config.served_model_name,  # type: ignore[attr-defined]
                sum(content.num_unpruned for content in contents),
                sum(len(content.full) for content in contents),
            )
        return super()._maybe_apply_prompt_updates(mm_items, mm_res)  # type: ignore[misc]

    def _shrunk(
        self, update: Any, mm_items: Any, requests: Sequence[PruningRequest]
    ) -> PromptUpdate:
        def replacement(item_idx: int) -> "PrunedContent":
            stock = update.replacement
            tokens = stock(item_idx) if callable(stock) else stock
            num_structure = self._family.num_structure_rows(
                self.info, update.modality, mm_items, item_idx
            )
            num_kept = kept_rows(len(tokens), num_structure, requests[item_idx].keep_ratio)
            return PrunedContent(list(tokens[:num_kept]), num_unpruned=len(tokens))

        return dataclasses.replace(update, replacement=replacement)


def _refuse_embeddings(mm_items: Any) -> None:
    """Which rows of somebody else's embeddings are structure is not known here.

    Raises:
        VLLMValidationError: HTTP 400.
    """
    for modality, items in mm_items.items():
        if items.get_passthrough_data():
            raise VLLMValidationError(
                f"{modality} embeddings cannot be pruned: send the {modality} itself, or "
                f"{KEEP_RATIO_KEY}=1.0 with them",
                parameter=KEEP_RATIO_KEY,
            )


@dataclass
class PrunedContent(PromptUpdateDetails):
    """The placeholders of a pruned item; it rides with the item through the processor cache."""

    num_unpruned: int = 0
    """Placeholders that the stock processor would have written."""


def _take_requests(
    kwargs: Mapping[str, object],
) -> tuple[Requests | None, dict[str, object]]:
    rest = dict(kwargs)
    return rest.pop(REQUESTS_KEY, None), rest  # type: ignore[return-value]


class _TextContexts:
    """The text that each item's choice may depend on."""

    def __init__(self, info: Any, family: Family, options: Options) -> None:
        config = options.config
        tokenizer = info.get_tokenizer()
        self._reads_text = uses_text(config.selector) and options.max_text_tokens > 0
        self._max_tokens = options.max_text_tokens
        self._placeholders = family.placeholder_ids(info.get_hf_config())
        self._not_text = special_ids(tokenizer) | set(self._placeholders.values())
        own_template = getattr(info.get_hf_processor(), "chat_template", None)
        given = config.turn_end and [
            tokenizer.encode(text, add_special_tokens=False) for text in config.turn_end
        ]

        @lru_cache(maxsize=NUM_TEMPLATES)
        def turn_ends(template: str | None) -> list[list[int]]:
            if given is not None:
                return given  # type: ignore[return-value]
            return turn_end_sequences(tokenizer, own_template if template is None else template)

        turn_ends(None)  # at start-up, not in the first request
        self._turn_ends = turn_ends

    def of_prompt(
        self, prompt: list[int], counts: Mapping[str, int], template: str | None
    ) -> dict[str, list[tuple[int, ...]]]:
        """Text context of every item, by modality.

        Args:
            prompt: one placeholder token per item.
            counts: items per modality.
            template: that the prompt was rendered with; None for the model's own.
        """
        if not self._reads_text:
            return {modality: [()] * count for modality, count in counts.items()}
        turn_ends = self._turn_ends(template)
        contexts = {}
        for modality, count in counts.items():
            placeholder = self._placeholders[modality]
            ends = [i + 1 for i, token in enumerate(prompt) if token == placeholder]
            if len(ends) != count:
                raise VLLMValidationError(
                    f"the prompt has {len(ends)} {modality} placeholders for {count} items"
                )
            contexts[modality] = [
                tuple(text_context(prompt, end, self._not_text, turn_ends, self._max_tokens))
                for end in ends
            ]
        return contexts
