"""Whether a forward, attention included, may be one captured CUDA graph; and how large it is."""

from typing import Any


def may_be_captured(config: Any) -> bool:
    """Whether any may. config: vLLM's ``CompilationConfig``."""
    return config.cudagraph_mode is not None and config.cudagraph_mode.has_full_cudagraphs()


def may_hold_prompts(config: Any) -> bool:
    """Whether such a forward may have rows of several tokens: else it is of decodes alone.

    Args:
        config: vLLM's ``CompilationConfig``, once backends have said what they can: it may change
            until then.
    """
    return may_be_captured(config) and config.cudagraph_mode.mixed_mode().has_full_cudagraphs()


def most_captured_tokens(config: Any) -> int:
    """Tokens of the largest such forward; 0 for none. config: ``CompilationConfig``."""
    return (config.max_cudagraph_capture_size or 0) if may_be_captured(config) else 0
