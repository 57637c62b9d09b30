"""A pruning module on disk: a folder with ``model.safetensors`` and ``config.json``."""

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from vllm_covipal.core.pruner import PruningModule, PruningModuleConfig

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


def save_pruning_module(module: PruningModule, folder: str | os.PathLike[str]) -> None:
    """Write the module's folder, which is made where it is missing."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().float() for name, value in module.state_dict().items()}
    # Not save_file, whose files their owner alone can read.
    (target / WEIGHTS_NAME).write_bytes(save(weights))
    (target / CONFIG_NAME).write_text(module.config.to_json(), encoding="utf-8")


def read_config(folder: str | os.PathLike[str]) -> PruningModuleConfig:
    """The module's configuration, without its weights.

    Raises:
        ValueError: if it cannot be read, naming the file.
    """
    path = Path(folder) / CONFIG_NAME
    try:
        return PruningModuleConfig.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the pruning module's {path} ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_pruning_module(
    folder: str | os.PathLike[str],
    *,
    fingerprint: str | None = None,
    model_name: str = "",
    device: torch.device | str = "cpu",
) -> PruningModule:
    """The module of a folder, in float32, for inference.

    Args:
        folder: where ``save_pruning_module`` wrote.
        fingerprint: of the LVLM that it is to prune; None accepts any.
        model_name: that LVLM's name, for the message.
        device: where to put it.

    Raises:
        ValueError: if a file cannot be read or does not fit, or the module was trained for
            another model; the message names file or both models.
    """
    config = read_config(folder)
    if fingerprint is not None:
        check_fingerprint(config, fingerprint, model_name)
    path = Path(folder) / WEIGHTS_NAME
    with torch.device("cpu"):  # vLLM builds models under a device and a dtype of its own
        module = PruningModule(config).float()
    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the pruning module's {path} ({error})") from None
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its {CONFIG_NAME}: {error}") from None
    for name, weight in module.state_dict().items():
        if not weight.isfinite().all():  # of a training that went wrong: any order of tokens
            raise ValueError(f"{path}: {name} holds what is no finite number: train it again")
    return module.to(device).eval().requires_grad_(False)


def check_fingerprint(config: PruningModuleConfig, fingerprint: str, model_name: str) -> None:
    """Refuse a module trained for another model.

    Raises:
        ValueError: naming both models and both fingerprints.
    """
    if config.fingerprint != fingerprint:
        raise ValueError(
            f"the pruning module was trained for {config.trained_for or 'an unnamed model'} "
            f"(fingerprint {config.fingerprint or 'none'}), not for "
            f"{model_name or 'this model'} (fingerprint {fingerprint})"
        )


def weights_digest(folder: str | os.PathLike[str]) -> str:
    """Sixteen hex digits of both files: the module's identity in cache keys.

    Raises:
        ValueError: if a file cannot be read.
    """
    digest = hashlib.sha256()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        path = Path(folder) / name
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise ValueError(f"cannot read {path} ({error.strerror})") from None
    return digest.hexdigest()[:16]
