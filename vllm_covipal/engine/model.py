"""Mixins over vLLM's model classes: the encoder's output is pruned, the rest is the stock model.

They stand before the stock class, ``class Pruning(PruningMixin, Stock)``, and give an item that
asks for nothing to it untouched.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor
from vllm.lora.layers import VocabParallelEmbeddingWithLoRA

from vllm_covipal.engine import mrope
from vllm_covipal.engine.families import Family
from vllm_covipal.engine.options import attached
from vllm_covipal.engine.request_fields import take
from vllm_covipal.engine.visual_pruner import PrunedItem, VisualPruner


class PruningMixin:
    """For models with one position per token: kept tokens stand one after the other."""

    family: ClassVar[Family]

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        """As vLLM's models.

        Raises:
            ValueError: if the pruning module cannot be loaded or does not fit the model.
        """
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        options = attached(vllm_config.model_config)
        if options is None:
            raise RuntimeError("this class is started by covipal only, with its options")
        self.visual_pruner = VisualPruner(options, self.family, self, vllm_config)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Rows of each item, the kept ones where it asks to be pruned."""
        stock = super().embed_multimodal  # type: ignore[misc]
        modality, requests, batch = take(kwargs)
        if not requests:
            return stock(**batch)
        pruned = self.visual_pruner(modality, requests, batch, stock, self._embed_text)
        return [self._placed(modality, item) for item in pruned]

    def _placed(self, modality: str, item: PrunedItem) -> Tensor:
        return item.rows

    def _embed_text(self, token_ids: Tensor) -> Tensor:
        language_model = self.get_language_model()  # type: ignore[attr-defined]
        with _without_adapters(language_model):
            return language_model.embed_input_ids(token_ids)  # type: ignore[no-any-return]


class PruningMRoPEMixin(PruningMixin):
    """For M-RoPE models: kept tokens keep their place in the picture (``mrope.py``)."""

    supports_multimodal_pruning: ClassVar[bool] = True
    repositions_pruned_media: ClassVar[bool] = True

    def stock_mrope_positions(
        self, input_tokens: Sequence[int], mm_features: Sequence[Any]
    ) -> tuple[Tensor, int]:
        """The stock model's arithmetic, for an unpruned prompt."""
        return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]

    def get_mrope_input_positions(
        self, input_tokens: Sequence[int], mm_features: Sequence[Any]
    ) -> tuple[Tensor, int]:
        """Positions at admission: text as unpruned, visual tokens provisional."""
        return mrope.prompt_positions(self, input_tokens, mm_features)

    def recompute_mrope_positions(
        self,
        input_ids: Sequence[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        """The chunk's kept rows take their true positions."""
        return mrope.place_rows(
            input_ids,
            tuple(self.family.placeholder_ids(self.config).values()),  # type: ignore[attr-defined]
            multimodal_embeddings,
            mrope_positions,
            num_computed_tokens,
            self.config.text_config.hidden_size,  # type: ignore[attr-defined]
        )

    def _placed(self, modality: str, item: PrunedItem) -> Tensor:
        offsets = mrope.grid_offsets(self, modality, item.fields)
        return mrope.append_offsets(item.rows, offsets.to(item.rows.device)[:, item.indices])


@contextmanager
def _without_adapters(language_model: Any) -> Iterator[None]:
    """The model's own embeddings, whatever adapters the step's requests have.

    LoRA's layer goes by the tokens of the step, in their order, and a text context is none of them;
    and the rows that are chosen are cached for requests with any adapter.
    """
    layers = [m for m in language_model.modules() if isinstance(m, VocabParallelEmbeddingWithLoRA)]
    for layer in layers:
        layer.forward = layer.base_layer.forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
