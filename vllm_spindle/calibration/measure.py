"""What each method does to each band, in the same blocks: attention outputs and answers.

Two measures. ``error`` is local: how far a layer's attention output moves, inputs held as they
were. ``divergence`` is what comes out: the model answers over reduced contexts, and its next-token
distributions are compared with its own. Only answer tokens see a reduced context in serving, so
``error`` is taken at their queries and, apart, at the recent prompt tokens', which are dense.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_spindle.calibration.attention import attend
from vllm_spindle.calibration.capture import CapturedPrompt, replay
from vllm_spindle.calibration.reduce import Reduced, cover_sizes, dense, reduce_layer
from vllm_spindle.calibration.unfolded import unfold_layer
from vllm_spindle.config import MethodName, SpindleConfig
from vllm_spindle.policy import SpindlePolicy

METHODS: tuple[MethodName, ...] = ("evict", "merge", "both")


@dataclass(frozen=True)
class BandMeasure:
    """One method in one band, the other bands whole; means over prompts, layers and heads.

    Attributes:
        recent_error, answer_error: relative L2 error of the attention output, [0, ...).
        divergence: KL of the answer's next-token distributions, nats.
        overflow: share of the context tokens turned away for want of an entry.
        region_blocks: blocks of the band's reduced region, the same for all methods.
    """

    method: MethodName
    recent_error: float
    answer_error: float
    divergence: float
    overflow: float
    region_blocks: float


@dataclass(frozen=True)
class WholeMeasure:
    """All bands reduced, each by its method.

    Attributes:
        divergence: KL of the answer's next-token distributions, nats.
        agreement: share of the answer's tokens that stay the likeliest.
    """

    band_methods: tuple[MethodName, ...]
    divergence: float
    agreement: float

    def as_report(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self) | {"band_methods": list(self.band_methods)}


@dataclass(frozen=True)
class Measured:
    """One configuration: every method in every band, and whole plans."""

    config: SpindleConfig
    bands: tuple[range, ...]
    by_band: tuple[dict[MethodName, BandMeasure], ...]
    wholes: tuple[WholeMeasure, ...]
    chosen: WholeMeasure

    @property
    def plan(self) -> SpindleConfig:
        """The configuration with the chosen methods, for serving."""
        methods = self.chosen.band_methods
        return self.config.model_copy(
            update={"band_methods": methods, "num_bands": len(methods), "method": "evict"}
        )

    def as_report(self) -> dict[str, Any]:
        """Bands and whole plans, ready for JSON."""
        return {
            "bands": [
                {
                    "first_layer": layers.start,
                    "last_layer": layers.stop - 1,
                    "chosen": chosen,
                    "methods": {name: asdict(found) for name, found in measures.items()},
                }
                for layers, measures, chosen in zip(
                    self.bands, self.by_band, self.chosen.band_methods, strict=True
                )
            ],
            "wholes": [whole.as_report() for whole in self.wholes],
        }


class Bench:
    """The model and its prompts under one configuration; contexts are reduced once."""

    def __init__(
        self, model: Any, prompts: Sequence[CapturedPrompt], policy: SpindlePolicy
    ) -> None:
        self.policy = policy
        self._model = model
        self._prompts = prompts
        self._plans = [policy.plan(prompt.prompt_len) for prompt in prompts]
        self._reduced: dict[tuple[int, int, MethodName], Reduced] = {}

    def band(self, band: int, method: MethodName) -> BandMeasure:
        """One method in one band, the others whole."""
        errors, overflows = [], []
        for i, prompt in enumerate(self._prompts):
            for layer_idx in self.policy.bands[band]:
                reduced = self._layer(i, layer_idx, method)
                errors.append(_output_errors(prompt, layer_idx, reduced))
                overflows.append(reduced.overflow)
        alone: list[MethodName | None] = [None] * len(self.policy.bands)
        alone[band] = method
        recent_error, answer_error = torch.tensor(errors).mean(dim=0).tolist()
        return BandMeasure(
            method=method,
            recent_error=recent_error,
            answer_error=answer_error,
            divergence=self._replay(alone)[0],
            overflow=sum(overflows) / len(overflows),
            region_blocks=sum(p[band].reduced_blocks for p in self._plans) / len(self._plans),
        )

    def whole(self, band_methods: Sequence[MethodName]) -> WholeMeasure:
        """Every band by its own method."""
        return WholeMeasure(tuple(band_methods), *self._replay(band_methods))

    def _replay(self, band_methods: Sequence[MethodName | None]) -> tuple[float, float]:
        divergences, agreements = [], []
        for i, prompt in enumerate(self._prompts):
            layers = [
                self._layer(i, layer_idx, band_methods[band])
                for band, layers in enumerate(self.policy.bands)
                for layer_idx in layers
            ]
            logits = replay(
                self._model,
                prompt,
                [layer.context for layer in layers],
                [layer.num_context for layer in layers],
            )
            divergences.append(_divergence(prompt.logits, logits))
            agreements.append(logits.argmax(dim=-1) == prompt.logits.argmax(dim=-1))
        return float(torch.cat(divergences).mean()), float(torch.cat(agreements).float().mean())

    def _layer(self, i: int, layer_idx: int, method: MethodName | None) -> Reduced:
        if method is None:
            layer = self._prompts[i].layers[layer_idx]
            nothing = dense(layer.keys[:, :0], layer.values[:, :0])
            return Reduced(nothing, 0, torch.zeros(layer.keys.shape[0], 0, dtype=torch.int64))
        key = (i, layer_idx, method)
        if key not in self._reduced:
            plan = self._plans[i][self.policy.band_of_layer(layer_idx)]
            self._reduced[key] = reduce_layer(
                self.policy, method, plan, self._prompts[i], layer_idx
            )
        return self._reduced[key]


def mean_covers(policy: SpindlePolicy, prompts: Sequence[CapturedPrompt]) -> list[dict[str, Any]]:
    """Per layer the entries needed over tokens, by kv head, mean over prompts; ready for JSON."""
    covers = []
    for layer_idx in range(policy.num_layers):
        sizes = [cover_sizes(policy, prompt, layer_idx) for prompt in prompts]
        covers.append(
            {
                "layer": layer_idx,
                "keys": torch.tensor([size.keys for size in sizes]).mean(dim=0).tolist(),
                "values": torch.tensor([size.values for size in sizes]).mean(dim=0).tolist(),
                "layer_keys": sum(size.layer_keys for size in sizes) / len(sizes),
                "layer_values": sum(size.layer_values for size in sizes) / len(sizes),
            }
        )
    return covers


def mean_unfolded(
    policy: SpindlePolicy, prompts: Sequence[CapturedPrompt]
) -> list[dict[str, float]]:
    """Per layer the paper's own route, mean over prompts; ready for JSON."""
    rows = []
    for layer_idx in range(policy.num_layers):
        band = policy.band_of_layer(layer_idx)
        found = [
            asdict(unfold_layer(policy, policy.plan(prompt.prompt_len)[band], prompt, layer_idx))
            for prompt in prompts
        ]
        means = {name: sum(each[name] for each in found) / len(found) for name in found[0]}
        rows.append({"layer": layer_idx, **means})
    return rows


def _divergence(expected: Tensor, found: Tensor) -> Tensor:
    """KL divergence of each row. [N]."""
    expected, found = expected.log_softmax(dim=-1), found.log_softmax(dim=-1)
    return (expected.exp() * (expected - found)).sum(dim=-1)


def _output_errors(prompt: CapturedPrompt, layer_idx: int, reduced: Reduced) -> tuple[float, float]:
    """Relative error of a layer's outputs, at the dense prompt tokens and at the answer's."""
    layer, start = prompt.layers[layer_idx], reduced.num_context
    queries = layer.queries[:, :, start - layer.keys.shape[1] :]
    tail = (layer.keys[:, start:], layer.values[:, start:])
    whole = dense(layer.keys[:, :start], layer.values[:, :start])
    expected = attend(queries, *whole, *tail, layer.scale)
    found = attend(queries, *reduced.context, *tail, layer.scale)
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-12)
    num_answers = len(prompt.answer)
    return float(error[..., :-num_answers].mean()), float(error[..., -num_answers:].mean())
