"""An in-process engine over a vision-language model, with eyes on what reaches its LM."""

import dataclasses
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

import tiny_lvlm
from engine_probe.garbage import freeze_imports

DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "kv_cache_memory_bytes": 64 << 20,
    "max_model_len": 2048,
    "max_num_batched_tokens": 2048,
    "seed": 0,
}
VIDEO_FAMILIES = ("llava_onevision", "qwen2_vl", "qwen2_5_vl")


@dataclasses.dataclass
class LvlmAsk:
    """One request: words around its pictures (width, height, seed) and clips, and its ratio."""

    words: str
    pictures: Sequence[tuple[int, int, int]] = ()
    clips: Sequence[tuple[int, int, int, int]] = ()
    keep_ratio: float | None = None

    def prompt(self, family: str) -> dict[str, Any]:
        """As ``LLM.generate`` takes it. Pictures stand in the words at ``@``, clips at ``&``."""
        media: dict[str, Any] = {}
        if self.pictures:
            media["image"] = [tiny_lvlm.picture(*picture) for picture in self.pictures]
        if self.clips:
            media["video"] = [tiny_lvlm.clip(*clip) for clip in self.clips]
            if family == "qwen2_5_vl":
                media["video"] = [(clip, _metadata(clip)) for clip in media["video"]]
        text = self.words.replace("@", tiny_lvlm.placeholder(family))
        text = text.replace("&", tiny_lvlm.placeholder(family, "video"))
        request: dict[str, Any] = {"prompt": f"USER : {text} ASSISTANT :"}
        if media:
            request["multi_modal_data"] = media
            if self.keep_ratio is not None:
                request["mm_processor_kwargs"] = {"covipal_keep_ratio": self.keep_ratio}
        return request


def _metadata(clip: Any) -> dict[str, Any]:
    frames = len(clip)
    return {"total_num_frames": frames, "fps": 2.0, "duration": frames / 2.0, "video_backend": "",
            "frames_indices": list(range(frames)), "do_sample_frames": False}  # fmt: skip


@contextmanager
def lvlm_engine(
    folder: str, family: str, covipal: dict[str, Any] | None, **options: Any
) -> Iterator[LLM]:
    """vLLM over the model of a folder; ended on leaving."""
    section = {} if covipal is None else {"additional_config": {"covipal": covipal}}
    limits = {"image": 3} | ({"video": 1} if family in VIDEO_FAMILIES else {})
    freeze_imports()
    llm = LLM(folder, limit_mm_per_prompt=limits, **{**DEFAULTS, **section, **options})
    try:
        yield llm
    finally:
        # vLLM shuts an engine down when it is collected, and with it the process groups that the
        # next one needs: so now, not later.
        vars(llm).clear()
        gc.collect()
        cleanup_dist_env_and_memory()


def answer(
    llm: LLM, family: str, asks: Sequence[LvlmAsk], *, max_tokens: int = 8, one_by_one: bool = False
) -> list[dict[str, Any]]:
    """Prompt length, tokens and their log-probabilities of each request."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0)
    prompts = [ask.prompt(family) for ask in asks]
    batches = [[prompt] for prompt in prompts] if one_by_one else [prompts]
    return [
        {
            "prompt_len": len(output.prompt_token_ids),
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [next(iter(step.values())).logprob for step in output.outputs[0].logprobs],
        }
        for batch in batches
        for output in llm.generate(batch, params, use_tqdm=False)
    ]


def model_of(llm: LLM) -> Any:
    """vLLM's model in this process."""
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner.get_model()


class Watch:
    """What the encoder gave, what was chosen, and what reached the language model."""

    def __init__(self, model: Any) -> None:
        self.encoded: list[torch.Tensor] = []
        self.indices: list[torch.Tensor] = []
        self.embeddings: list[torch.Tensor] = []
        self.positions: list[torch.Tensor] = []
        self._watch_pruner(getattr(model, "visual_pruner", None))
        language_model = model.get_language_model().model
        stock = language_model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._note_step(args, kwargs)
            return stock(*args, **kwargs)

        # vLLM's __call__ of a compilable module runs no hooks.
        language_model.forward = forward

    def _watch_pruner(self, pruner: Any) -> None:
        if pruner is None:
            return
        stock_encoded, stock_select = pruner._encoded, pruner._selector.select

        def encoded(*args: Any) -> Any:
            rows = stock_encoded(*args)
            self.encoded += [of_item.clone() for of_item in rows]
            return rows

        def select(items: Any) -> Any:
            indices = stock_select(items)
            self.indices += [index.clone() for index in indices]
            return indices

        pruner._encoded, pruner._selector.select = encoded, select

    def _note_step(self, args: Any, kwargs: Any) -> None:
        values = dict(zip(("input_ids", "positions", "_", "inputs_embeds"), args, strict=False))
        values |= kwargs
        if values["inputs_embeds"] is not None:
            self.embeddings.append(values["inputs_embeds"].clone())
        self.positions.append(values["positions"].clone())

    def clear(self) -> None:
        """Forget what was seen."""
        for seen in (self.encoded, self.indices, self.embeddings, self.positions):
            seen.clear()
