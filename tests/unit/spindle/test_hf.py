"""SpindleKV's transformers cache: core's choice, true positions, and refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

import tiny
from vllm_spindle import hf_layers
from vllm_spindle.baselines import make_method
from vllm_spindle.calibration.capture import rotary_table
from vllm_spindle.config import SpindleConfig
from vllm_spindle.core.choice import ChoiceRule, choose_kept
from vllm_spindle.core.reference import attend_reduced
from vllm_spindle.hf import SpindleCache, compress, enable, read
from vllm_spindle.policy import SpindlePolicy

BLOCK = 8
OPTIONS = SpindleConfig(keep_ratio=0.5, window=16, observers=24, min_prompt_len=0, budget="pyramid")
LENGTH = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_llama(tmp_path_factory.mktemp("llama"), num_layers=2, num_heads=4)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    loaded = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    enable(loaded)
    return loaded


def _ids(num_tokens: int, seed: int = 0) -> Tensor:
    return torch.tensor([tiny.prompts(1, [num_tokens], seed=seed)[0]["prompt_token_ids"]])


def _cache(model: Any, options: SpindleConfig = OPTIONS, **more: Any) -> SpindleCache:
    return SpindleCache(model.config, options, block_size=BLOCK, **more)


def _generate(model: Any, ids: Tensor, num_new: int, cache: Any = None) -> list[int]:
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        do_sample=False,
    )
    return out[0, ids.shape[1] :].tolist()


class _Seen:
    """Attention inputs and outputs of every call, by layer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        update, attend = hf_layers.QueryLayer.update, hf_layers.QueryLayer.attend
        new: list[tuple[Tensor, Tensor]] = []

        def watched_update(layer: Any, keys: Tensor, values: Tensor, *args: Any, **kw: Any) -> Any:
            new.append((keys, values))
            return update(layer, keys, values, *args, **kw)

        def watched_attend(layer: Any, query: Tensor, mask: Any, scale: float) -> Tensor | None:
            out = attend(layer, query, mask, scale)
            self.calls.append((query[0], *(t[0] for t in new.pop()), out))
            return out

        monkeypatch.setattr(hf_layers.QueryLayer, "update", watched_update)
        monkeypatch.setattr(hf_layers.QueryLayer, "attend", watched_attend)

    def layer(self, layer_idx: int, num_layers: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Queries [T, H, D], keys and values [T, K, D], and the outputs over what is left."""
        calls = self.calls[layer_idx::num_layers]
        joined = [torch.cat([call[i] for call in calls], dim=1).transpose(0, 1) for i in range(3)]
        return (
            joined[0],
            joined[1],
            joined[2],
            [call[3][0] for call in calls if call[3] is not None],
        )


@pytest.mark.parametrize("waits", [0, 3])
@pytest.mark.parametrize("gqa", ["union", "mean", "unfold"])
def test_decode_attends_to_what_the_core_keeps(
    model: Any, monkeypatch: pytest.MonkeyPatch, gqa: Any, waits: int
) -> None:
    """Outputs after the reduction are the oracle's over the core's choice, in every layer."""
    seen = _Seen(monkeypatch)
    options = OPTIONS.model_copy(update={"gqa": gqa, "reduce_after": waits})
    cache = _cache(model, options)
    _generate(model, _ids(LENGTH), 6, cache)
    policy = SpindlePolicy(options, 2, BLOCK, 2)
    for layer_idx, plan in enumerate(policy.plan(LENGTH)):
        queries, keys, values, outputs = seen.layer(layer_idx, 2)
        copies = 2 if gqa == "unfold" else 1
        observed = torch.from_numpy(policy.observed(LENGTH, [plan]))
        assert len(observed) == 24 + 16
        observed = torch.cat([observed, LENGTH + torch.arange(waits)])
        kept = choose_kept(
            ChoiceRule("received", 5, gqa, window=16),
            queries[observed].view(-1, 2, 2, 32).permute(1, 2, 0, 3),
            keys[:LENGTH].transpose(0, 1),
            observed,
            scale=32**-0.5,
            num_context=plan.tail_block * BLOCK,
            num_kept=plan.reduced_blocks * BLOCK // copies,
            num_ahead=waits,
        )
        assert torch.equal(cache.layers[layer_idx].reduced.positions, kept.flatten(0, -2))
        assert len(outputs) == 5 - waits
        expected = attend_reduced(
            queries[LENGTH + waits :],
            keys,
            values,
            kept,
            num_context=plan.tail_block * BLOCK,
            scale=32**-0.5,
        )
        torch.testing.assert_close(torch.cat(outputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["merge", "both"])
def test_merged_tokens_stay_within_the_thresholds(model: Any, method: Any) -> None:
    """Codebooks hold more tokens than rows would, each near what it was."""
    options = OPTIONS.model_copy(
        update={"method": method, "theta_key": 0.7, "theta_value": 0.6, "budget": "uniform"}
    )
    ids = _ids(400)
    ids[:, :] = ids[:, torch.arange(400) % 50]  # words that come again
    table = rotary_table(model, 400, 32)
    cache, stock = _cache(model, options, cos_sin=table), DynamicCache()
    with torch.inference_mode():
        model(ids, past_key_values=stock)
        model(ids, past_key_values=cache)
    for layer, own in zip(cache.layers, stock.layers, strict=True):
        left = layer.reduced
        for head, there in enumerate(left.is_there):
            places = left.positions[head, there]
            for found, all_rows, theta in (
                (left.keys, own.keys, 0.7),
                (left.values, own.values, 0.6),
            ):
                cosine = torch.cosine_similarity(
                    found[head, there].float(), all_rows[0, head, places], dim=-1
                )
                assert cosine.min() > theta - 0.01
        rows = left.num_bytes // (2 * 2 * 32 * 2) - (400 - left.num_context)
        assert int(left.is_there.sum(-1).max()) > rows
    assert cache.true_bytes <= 0.5 * 2 * 400 * 2 * 2 * 32 * 2


def test_nothing_reduced_is_stock(model: Any) -> None:
    """At a ratio of 1 the tokens are those of a stock cache."""
    whole = _cache(model, SpindleConfig(window=16))
    expected = _generate(model, _ids(LENGTH), 12)
    assert _generate(model, _ids(LENGTH), 12, whole) == expected
    assert whole.get_seq_length() == LENGTH + 11


def test_positions_go_on_from_the_prompts_true_length(model: Any) -> None:
    """All context kept by a plan of whole blocks minus one: later tokens barely move."""
    options = OPTIONS.model_copy(update={"keep_ratio": 0.97, "budget": "uniform"})
    cache, stock, ids = _cache(model, options), DynamicCache(), _ids(LENGTH)
    more = _ids(LENGTH + 9, seed=0)[:, LENGTH:]
    with torch.inference_mode():
        for each in (cache, stock):
            model(ids, past_key_values=each)
        found = model(more, past_key_values=cache).logits
        expected = model(more, past_key_values=stock).logits
    assert cache.true_bytes < 0.97 * 2 * LENGTH * 2 * 2 * 32 * 2
    assert cache.get_seq_length() == stock.get_seq_length() == LENGTH + 9
    for layer, own in zip(cache.layers, stock.layers, strict=True):
        start = layer.reduced.num_context
        tail = layer.keys.shape[-2]
        # Layer 0 sees no attention yet: equal keys mean equal positions.
        if layer is cache.layers[0]:
            torch.testing.assert_close(layer.keys, own.keys[:, :, start:])
        assert tail == LENGTH + 9 - start
    agree = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    assert agree > 0.5


def test_a_prompt_may_come_in_chunks(model: Any) -> None:
    """With prompt_len told, chunks give the same kept tokens and answers as the whole."""
    ids = _ids(LENGTH)
    whole, cut = _cache(model), _cache(model, prompt_len=LENGTH)
    with torch.inference_mode():
        expected = model(ids, past_key_values=whole).logits[:, -1]
        for part in ids.split(33, dim=1):
            found = model(part, past_key_values=cut).logits[:, -1]
            more = [layer.reduced is not None for layer in cut.layers]
            assert more == [cut.get_seq_length() == LENGTH] * 2
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        next_ids = _ids(5, seed=3)
        found = model(next_ids, past_key_values=cut).logits
        torch.testing.assert_close(
            found, model(next_ids, past_key_values=whole).logits, rtol=1e-4, atol=1e-4
        )
    for a, b in zip(whole.layers, cut.layers, strict=True):
        assert torch.equal(a.reduced.positions, b.reduced.positions)


def test_questions_come_in_turns(model: Any) -> None:
    """`generate` goes on over a reduced document, question after question."""
    document, first, second = _ids(LENGTH), _ids(4, seed=5), _ids(3, seed=6)
    method = make_method("snapkv", num_recent=16)
    cache, twin = (compress(model, document, method, 0.5) for _ in range(2))
    assert cache.true_bytes == cache.full_bytes / 2 == 2 * LENGTH * 2 * 32 * 2
    one = _generate(model, torch.cat([document, first], dim=1), 5, cache)
    said = torch.tensor([one])
    two = _generate(model, torch.cat([document, first, said, second], dim=1), 5, cache)
    found = []
    with torch.inference_mode():
        for turn in (first, torch.cat([said[:, -1:], second], dim=1)):
            unread = turn
            for _ in range(5):
                unread = model(unread, past_key_values=twin).logits[:, -1:].argmax(-1)
                found.append(int(unread))
    assert [*one, *two] == found
    assert cache.get_seq_length() == LENGTH + 4 + 5 + 3 + 4


def test_crop_takes_back_dense_tokens_alone(model: Any) -> None:
    """The last prompt token can be read again; what was reduced cannot come back."""
    cache, ids = _cache(model), _ids(LENGTH)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        first = model(ids[:, :1], past_key_values=cache).logits
        cache.crop(-1)
        torch.testing.assert_close(model(ids[:, :1], past_key_values=cache).logits, first)
    with pytest.raises(ValueError, match="are dense"):
        cache.crop(-LENGTH)


def test_a_model_that_was_not_enabled_is_refused(folder: Path, model: Any) -> None:
    """Before anything runs; and where attention is switched away in between."""
    stock = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with pytest.raises(ValueError, match="call vllm_spindle.hf.enable"):
        SpindleCache(stock.config, OPTIONS)
    cache = _cache(model)
    with torch.inference_mode():
        stock(_ids(LENGTH), past_key_values=cache)
        with pytest.raises(RuntimeError, match="does not pass through"):
            stock(_ids(2), past_key_values=cache)


def test_what_cannot_be_reduced_is_refused(model: Any) -> None:
    """Batches, padding, and codebooks without a rotary table."""
    with pytest.raises(ValueError, match="one prompt at a time"):
        model(_ids(LENGTH).expand(2, -1), past_key_values=_cache(model))
    with pytest.raises(ValueError, match="needs cos_sin"):
        _cache(model, OPTIONS.model_copy(update={"method": "merge"}))
    cache = _cache(model)
    with torch.inference_mode():
        model(_ids(LENGTH), past_key_values=cache)
        mask = torch.ones(1, LENGTH + 2, dtype=torch.long)
        mask[0, :3] = 0
        with pytest.raises(ValueError, match="without padding"):
            model(_ids(2), past_key_values=cache, attention_mask=mask)


def test_other_caches_are_left_alone(model: Any, folder: Path) -> None:
    """An enabled model answers as before with a stock cache."""
    stock = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = _ids(LENGTH)
    assert _generate(model, ids, 10) == _generate(stock, ids, 10)


def test_what_is_read_ahead_is_taken_back(model: Any) -> None:
    """The prompt as if it had been read alone, the answer's queries beside it, its end the last."""
    ids = _ids(LENGTH)
    answer = _generate(model, ids, 8)
    plain, ahead = read(model, ids), read(model, ids, ahead=8)
    for alone, each in zip(plain, ahead, strict=True):
        assert alone.ahead is None
        assert each.ahead.shape[2] == 8
        assert torch.equal(each.keys, alone.keys)
        assert torch.equal(each.queries, alone.queries)
    assert answer[3] not in answer[:3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.generation_config, "eos_token_id", [answer[3], 5])
        assert {each.ahead.shape[2] for each in read(model, ids, ahead=8)} == {3}


def test_what_the_answer_looks_at_is_kept(model: Any) -> None:
    """Of the answer's every token, whatever each query head looked at most, in every layer."""
    ids, waits = _ids(LENGTH), 4
    method = make_method(
        "reduce_after", block_size=BLOCK, window=16, min_prompt_len=0, pool_kernel=1,
        reduce_after=waits,
    )  # fmt: skip
    layers = read(model, ids, ahead=method.reads_ahead)
    for layer, left in zip(layers, method.reduce(layers, 0.5), strict=True):
        logits = torch.einsum("kgad,ktd->kgat", layer.ahead, layer.keys[:, : left.num_context])
        for head, most in enumerate(logits.argmax(-1)):
            assert {*most.flatten().tolist()} <= {*left.positions[head].tolist()}


def test_reading_twice_and_ahead_is_refused(model: Any) -> None:
    """Either says what the prompt is needed for; the message names the dial."""
    method = make_method("two_pass", block_size=BLOCK, min_prompt_len=0, reduce_after=2)
    with pytest.raises(ValueError, match="reduce_after=2.*use one of them"):
        compress(model, _ids(LENGTH), method, 0.5)
