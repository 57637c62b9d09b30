"""Answers over a reduced cache, offline: one model, one method, one share of the bytes.

Every token of an answer, its first one included, comes from the reduced cache. A question inside
the prompt: the whole prompt is read, then reduced, the last prompt token is taken off the cache and
fed once more, now against what is left. Questions behind the prompt are fed as they are.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch

from vllm_spindle.baselines import make_method
from vllm_spindle.baselines.base import PromptLayer
from vllm_spindle.baselines.spindle import Spindle
from vllm_spindle.hf import enable, read, reduce_read
from vllm_spindle.hf_layers import QueryCache


class PromptReader:
    """Reads prompts, and remembers the newest: many methods are asked about the same ones."""

    def __init__(self, model: Any, num_remembered: int = 0) -> None:
        """num_remembered: prompts; each takes its keys, values and queries of all layers."""
        self._model, self._num_remembered = model, num_remembered
        self._read: dict[tuple[int | bool, ...], list[PromptLayer]] = {}

    def read(self, prompt_ids: Sequence[int], *, twice: bool, ahead: int) -> list[PromptLayer]:
        """See ``hf.read``."""
        key = (twice, ahead, *prompt_ids)
        layers = self._read.pop(key, None)
        if layers is None:
            ids = torch.tensor([list(prompt_ids)], device=self._model.device)
            layers = read(self._model, ids, twice=twice, ahead=ahead)
        self._read[key] = layers
        while len(self._read) > self._num_remembered:
            del self._read[next(iter(self._read))]
        return layers


class Answerer:
    """Greedy answers of a transformers model.

    Attributes:
        method: that reduces.
        true_bytes: of the last prompt, reduced; two-byte elements of the model's GQA cache.
        full_bytes: of the last prompt, whole.
    """

    def __init__(
        self,
        model: Any,
        *,
        method: str,
        byte_ratio: float,
        seed: int = 0,
        reader: "PromptReader | None" = None,
        **options: Any,
    ) -> None:
        """Pass the model's attention through ours (``hf.enable``).

        Args:
            model: a causal language model of transformers.
            method: key of ``baselines.METHODS`` or ``baselines.ABLATIONS``.
            byte_ratio: share of the prompt's true bytes to keep, (0, 1].
            seed: for methods that draw.
            reader: of this model; shared, it saves reading a prompt for each method.
            options: the method's own dials. SpindleKV's heads keep what was measured, if there
                is a profile beside the model.

        Raises:
            ValueError: if the method or a dial is unknown, or the ratio out of range.
        """
        if not 0 < byte_ratio <= 1:
            raise ValueError(f"byte_ratio must be in (0, 1], got {byte_ratio}")
        self.method = make_method(method, seed=seed, **options)
        if isinstance(self.method, Spindle):
            self.method = self.method.of_model(model.config._name_or_path)
        self._model = model
        self._byte_ratio = byte_ratio
        self.true_bytes = 0
        self.full_bytes = 0
        enable(model)
        self._reader = reader or PromptReader(model)

    @torch.inference_mode()
    def answer(
        self,
        prompt_ids: Sequence[int],
        followups: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Collection[int],
    ) -> list[list[int]]:
        """One greedy answer per follow-up, in turn, over one cache that goes on.

        A follow-up sees the reduced prompt and all follow-ups and answers before it, those whole.

        Args:
            prompt_ids: read, then reduced.
            followups: token ids of each question; ``[[]]`` if it is in the prompt. Only the first
                may be empty.
            max_new_tokens: most tokens of an answer.
            stop_ids: tokens that end an answer.

        Returns:
            Token ids of each answer, the stop token left out.

        Raises:
            ValueError: if the prompt is shorter than two tokens, or a later follow-up empty.
        """
        if len(prompt_ids) < 2 or not all(followups[1:]):
            raise ValueError("needs a prompt of two tokens or more, and no later follow-up empty")
        layers = self._reader.read(
            prompt_ids, twice=self.method.reads_twice, ahead=self.method.reads_ahead
        )
        cache = reduce_read(self._model, layers, self.method, self._byte_ratio)
        self.true_bytes, self.full_bytes = cache.true_bytes or 0, cache.full_bytes or 0
        answers, unread = [], []
        for followup in followups:
            if not followup:
                cache.crop(-1)
                unread = [prompt_ids[-1]]
            answer, unread = self._greedy(
                cache, [*unread, *followup], max_new_tokens, set(stop_ids)
            )
            answers.append(answer)
        return answers

    def _greedy(
        self, cache: QueryCache, token_ids: list[int], max_new_tokens: int, stop_ids: set[int]
    ) -> tuple[list[int], list[int]]:
        """The answer, and its last token, which the cache has not seen."""
        answer: list[int] = []
        token = self._read(cache, token_ids)
        while len(answer) < max_new_tokens:
            if token in stop_ids:
                return answer, [token]
            answer.append(token)
            if len(answer) < max_new_tokens:
                token = self._read(cache, [token])
        return answer, answer[-1:]

    def _read(self, cache: QueryCache, token_ids: list[int]) -> int:
        """Feed tokens; the likeliest next one."""
        ids = torch.tensor([token_ids], device=self._model.device)
        out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())
