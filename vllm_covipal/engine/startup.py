"""Once, in the front process, before the engine starts: check, prepare, say what is on."""

from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_covipal.config import CovipalConfig
from vllm_covipal.core.fingerprint import fingerprint
from vllm_covipal.core.pruner_files import check_fingerprint, read_config, weights_digest
from vllm_covipal.core.text_context import MAX_TEXT_TOKENS
from vllm_covipal.engine.compat import version_problem
from vllm_covipal.engine.options import Options, asked_for, attach
from vllm_covipal.engine.refusals import config_refusals, misplaced_options, raise_if_any
from vllm_covipal.engine.registration import CLASS_OF

# Under vLLM's logger tree, so that the user's logging settings apply.
logger = init_logger("vllm.covipal")


def prepare(vllm_config: VllmConfig) -> bool:
    """Check the configuration and, if covipal is asked for, switch it on.

    Returns:
        Whether the engine may prune.

    Raises:
        ValueError: for a bad option, or a combination that is not supported.
    """
    raise_if_any(list(misplaced_options(vllm_config)))
    config = asked_for(vllm_config)
    if config is None:
        return False
    problem = version_problem()
    if problem is not None:
        raise ValueError(f"covipal: {problem}")
    raise_if_any(config_refusals(vllm_config))
    model_config = vllm_config.model_config
    options = Options(config, *_of_selector(config, model_config))
    attach(model_config, options)
    # The class that vLLM starts, and its processor. What is known of the stock architecture
    # (model_config.architecture, capabilities) stays.
    model_config.hf_config.architectures = [CLASS_OF[model_config.architecture]]
    if current_platform.is_cuda():
        logger.warning(
            "CoViPAL on CUDA: checked without a GPU (devices of tensors, model runner V2 "
            "interpreted), not yet run on a GPU by us"
        )
    logger.info("CoViPAL on: %s", _describe(options))
    return True


def _of_selector(config: CovipalConfig, model_config: ModelConfig) -> tuple[str, int]:
    """What tells this selector's choices from another's, in cache keys; text tokens it reads."""
    asked = config.max_text_tokens
    if config.ppm is None:
        return f"{config.selector}-{config.seed}", MAX_TEXT_TOKENS if asked is None else asked
    try:
        module = read_config(config.ppm)
        check_fingerprint(module, fingerprint(model_config.hf_config), model_config.model)
        identity = f"ppm-{weights_digest(config.ppm)}"
    except ValueError as error:
        raise ValueError(f"covipal: ppm={config.ppm!r}: {error}") from None
    if asked not in (None, module.max_text_tokens):
        logger.warning(
            "CoViPAL: max_text_tokens=%d, but the pruning module was trained to read %d text "
            "tokens; leave max_text_tokens out to serve it as it was trained",
            asked,
            module.max_text_tokens,
        )
    return identity, module.max_text_tokens if asked is None else asked


def _describe(options: Options) -> str:
    config = options.config
    chooses = config.selector if config.ppm is None else f"ppm {config.ppm}"
    return (
        f"keep_ratio={config.keep_ratio} selector={chooses} "
        f"max_text_tokens={options.max_text_tokens} reuse_mib={config.reuse_mib}"
    )
