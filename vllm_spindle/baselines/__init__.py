"""Every method under one protocol and at equal true bytes; the registry is ``METHODS``."""

from collections.abc import Callable
from typing import Any

from vllm_spindle.baselines.adakv import AdaKV
from vllm_spindle.baselines.base import Method
from vllm_spindle.baselines.d2o import D2O
from vllm_spindle.baselines.expected_attention import ExpectedAttention
from vllm_spindle.baselines.full import Full
from vllm_spindle.baselines.h2o import H2O
from vllm_spindle.baselines.paper import Paper
from vllm_spindle.baselines.pyramidinfer import PyramidInfer
from vllm_spindle.baselines.pyramidkv import PyramidKV
from vllm_spindle.baselines.random import Random
from vllm_spindle.baselines.reduce_after import ReduceAfter
from vllm_spindle.baselines.snapkv import SnapKV
from vllm_spindle.baselines.spindle import Spindle
from vllm_spindle.baselines.streaming_llm import StreamingLLM
from vllm_spindle.baselines.two_pass import TwoPass

METHODS: dict[str, Callable[..., Method]] = {
    "full": Full,
    "random": Random,
    "streaming_llm": StreamingLLM,
    "h2o": H2O,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "pyramidinfer": PyramidInfer,
    "adakv": AdaKV,
    "expected_attention": ExpectedAttention,
    "d2o": D2O,
    "paper": Paper,
    "spindle": Spindle.of,
    "reduce_after": ReduceAfter.of,
    "two_pass": TwoPass.of,
}

ABLATIONS: dict[str, dict[str, Any]] = {
    "spindle_uniform": {"budget": "uniform"},
    "spindle_pyramid": {"budget": "pyramid"},
    "spindle_window": {"score": "pooled"},
    "spindle_no_last": {"last_query": False},
    "spindle_no_pool": {"pool_kernel": 1},
    "spindle_recent_32": {"recent": 32},
    "spindle_mean": {"gqa": "mean"},
    "spindle_random": {"score": "random"},
}
"""A method with one part taken out, or another in its place; names for ``make_method``."""


def make_method(name: str, *, seed: int = 0, **options: Any) -> Method:
    """A method by its name in ``METHODS``.

    Args:
        name: key of ``METHODS`` or ``ABLATIONS``.
        seed: for methods that draw.
        options: the method's own dials.

    Raises:
        ValueError: if there is no such method or dial.
    """
    if name in ABLATIONS:
        name, options = name.partition("_")[0], {**options, **ABLATIONS[name]}
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    if name == "random":
        options = {"seed": seed, **options}
    try:
        return METHODS[name](**options)
    except TypeError as error:
        raise ValueError(f"method {name!r}: {error}") from None
