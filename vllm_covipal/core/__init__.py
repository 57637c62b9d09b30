"""The method itself: stdlib and torch only, readable beside the paper, importable without vLLM."""
