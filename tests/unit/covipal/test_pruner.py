"""The pruning module against its slow twin, alone and in a batch, in memory and on disk."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import oracles_selectors as oracles
from vllm_covipal.core.pruner import PruningModule, PruningModuleConfig
from vllm_covipal.core.pruner_files import (
    load_pruning_module,
    read_config,
    save_pruning_module,
    weights_digest,
)
from vllm_covipal.core.ragged_attention import RaggedAttention


def _module(hidden_size: int = 48, **changes: object) -> PruningModule:
    torch.manual_seed(0)
    module = PruningModule(PruningModuleConfig.for_hidden_size(hidden_size, **changes))
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn(weight.shape) * 0.1)
    return module.eval()


def _rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("num_text", [0, 1, 5])
def test_scores_equal_the_slow_twin(num_text: int, text_first: bool) -> None:
    """Fused attention over packed rows is attention head by head in float64."""
    module = _module(text_first=text_first)
    visual, text = _rows(9, 48), _rows(num_text, 48, seed=1)
    expected = oracles.pruning_scores(dict(module.state_dict()), module.config, visual, text)
    assert torch.allclose(module([visual], [text]), expected.float(), atol=1e-5)


def test_first_block_reads_the_text_alone() -> None:
    """With one block and text first, a row's score does not depend on the other rows."""
    visual, other, text = _rows(9, 48), _rows(9, 48, seed=2), _rows(5, 48, seed=1)
    mixed = torch.cat([visual[:4], other[4:]])
    alone = _module(num_blocks=1)
    assert torch.allclose(alone([visual], [text])[:4], alone([mixed], [text])[:4], atol=1e-6)
    together = _module(num_blocks=1, text_first=False)
    assert not torch.allclose(together([visual], [text])[:4], together([mixed], [text])[:4])


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_scores_do_not_hang_on_the_scale_of_embeddings(scale: float) -> None:
    """Embeddings of any magnitude: the direction counts."""
    module, visual, text = _module(), _rows(9, 48), _rows(5, 48, seed=1)
    scaled = module([visual * scale], [text * scale])
    assert torch.allclose(module([visual], [text]), scaled, atol=1e-5)


def test_words_in_another_order_are_another_text() -> None:
    """Text rows carry their place."""
    module, visual, text = _module(), _rows(9, 48), _rows(5, 48, seed=1)
    assert not torch.allclose(module([visual], [text]), module([visual], [text.flip(0)]))


def test_a_zero_row_has_a_score() -> None:
    """Padding pixels may project to nothing."""
    assert bool(_module()([torch.zeros(3, 48)], [torch.zeros(2, 48)]).isfinite().all())


def test_gradients_reach_every_weight() -> None:
    """Two items, one without text: nothing is left out of training."""
    module = _module().train()
    module([_rows(9, 48), _rows(4, 48)], [_rows(5, 48), _rows(0, 48)]).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_are_scored_in_float32(dtype: torch.dtype) -> None:
    """The same scores within the first product's rounding, whatever type carried the values."""
    module, visual, text = _module(), _rows(9, 48).to(dtype), _rows(5, 48, seed=1).to(dtype)
    scores = module([visual], [text])
    assert scores.dtype == torch.float32
    exact = module([visual.float()], [text.float()])
    # The first product rounds the weights as the embeddings are; all else is float32.
    torch.testing.assert_close(scores, exact, rtol=0, atol=2 * torch.finfo(dtype).eps)
    assert not torch.equal(scores.to(dtype).float(), scores)


@pytest.mark.parametrize(
    ("hidden_size", "width"), [(64, 64), (896, 128), (1024, 128), (3584, 448), (8192, 512)]
)
def test_the_default_width_follows_the_model(hidden_size: int, width: int) -> None:
    """An eighth of the language model's, within bounds, heads of 64."""
    config = PruningModuleConfig.for_hidden_size(hidden_size)
    assert (config.width, config.num_heads) == (width, width // 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 100, "num_heads": 3}, "width 100 is no multiple of num_heads 3"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"ffn_ratio": 0}, "ffn_ratio must be positive"),
        ({"spread_share": 1.0}, r"spread_share must be in \[0, 1\), got 1.0"),
        ({"spread_by": "chance"}, "spread_by must be even or diverse, got 'chance'"),
        ({"max_text_tokens": -1}, "max_text_tokens must be at least 0, got -1"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, int], message: str) -> None:
    """A configuration is a module that can be built."""
    with pytest.raises(ValueError, match=message):
        PruningModuleConfig.for_hidden_size(64, **changes)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    """Same configuration, same scores, ready for inference; the digest is of the contents."""
    module = _module(fingerprint="0123456789abcdef", trained_for="tiny")
    save_pruning_module(module, tmp_path / "one")
    save_pruning_module(module, tmp_path / "two")
    loaded = load_pruning_module(tmp_path / "one", fingerprint="0123456789abcdef")
    assert loaded.config == module.config == read_config(tmp_path / "two")
    assert not loaded.training and not any(w.requires_grad for w in loaded.parameters())
    visual, text = [_rows(9, 48)], [_rows(5, 48)]
    assert torch.equal(loaded(visual, text), module(visual, text))
    assert weights_digest(tmp_path / "one") == weights_digest(tmp_path / "two")
    save_pruning_module(_module(trained_for="other"), tmp_path / "two")
    assert weights_digest(tmp_path / "one") != weights_digest(tmp_path / "two")


def test_both_files_are_readable_alike(tmp_path: Path) -> None:
    """Who serves is often another user than who trained; safetensors' own files are private."""
    save_pruning_module(_module(), tmp_path)
    config, weights = (tmp_path / name for name in ("config.json", "model.safetensors"))
    assert weights.stat().st_mode == config.stat().st_mode


def test_what_earlier_modules_do_not_record_is_known(tmp_path: Path) -> None:
    """Folders written before there were those keys are read; any other that lacks is refused."""
    save_pruning_module(_module(spread_share=0.5, max_text_tokens=7), tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    assert (values.pop("spread_share"), values.pop("spread_by")) == (0.5, "even")
    assert values.pop("max_text_tokens") == 7
    path.write_text(json.dumps(values))
    config = read_config(tmp_path)
    assert (config.spread_share, config.spread_by, config.max_text_tokens) == (0, "even", 128)
    del values["fingerprint"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="missing keys \\['fingerprint'\\]"):
        read_config(tmp_path)


def test_loading_ignores_the_default_dtype_and_device(tmp_path: Path) -> None:
    """vLLM builds models under a dtype and a device of its own; the module stays float32."""
    save_pruning_module(_module(), tmp_path)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            loaded = load_pruning_module(tmp_path)
    finally:
        torch.set_default_dtype(default)
    assert {(w.dtype, w.device.type) for w in loaded.parameters()} == {(torch.float32, "cpu")}
    assert all(map(torch.equal, loaded.parameters(), _module().parameters()))


def test_another_models_module_is_refused_by_name(tmp_path: Path) -> None:
    """Both models and both fingerprints are in the message."""
    save_pruning_module(_module(fingerprint="aaaa", trained_for="llava-small"), tmp_path)
    message = r"trained for llava-small \(fingerprint aaaa\), not for qwen-tiny \(fingerprint bbbb"
    with pytest.raises(ValueError, match=message):
        load_pruning_module(tmp_path, fingerprint="bbbb", model_name="qwen-tiny")
    assert load_pruning_module(tmp_path).config.trained_for == "llava-small"


def test_broken_folders_are_refused_by_name(tmp_path: Path) -> None:
    """Absent, unreadable, with a key too many, or of other sizes: the file is named."""
    with pytest.raises(ValueError, match=r"config\.json \(No such file"):
        load_pruning_module(tmp_path)
    save_pruning_module(_module(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"depth": 3}))
    with pytest.raises(ValueError, match=r"config\.json: unknown keys \['depth'\]"):
        load_pruning_module(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_blocks": 5}))
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit its config\.json"):
        load_pruning_module(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        load_pruning_module(tmp_path)
    broken = _module()
    broken.head.bias.data.fill_(float("nan"))
    save_pruning_module(broken, tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors: head\.bias .* no finite number"):
        load_pruning_module(tmp_path)
    save_pruning_module(_module(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot read the pruning module's .*model\.safetensors"):
        load_pruning_module(tmp_path)


@pytest.mark.gpu
def test_xformers_equals_item_by_item() -> None:
    """The block-diagonal kernel and PyTorch's attention are twins, ragged items, other keys."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("xformers.ops")
    attention = RaggedAttention([7, 1, 30], [3, 1, 40])
    query = _rows(38, 4, 32).cuda()
    key, value = _rows(44, 4, 32, seed=1).cuda(), _rows(44, 4, 32, seed=2).cuda()
    expected = attention.item_by_item(query, key, value)
    assert torch.allclose(attention(query, key, value), expected, atol=1e-4)
