"""Which method each band should use, by measurement on the user's own prompts. Offline: no vLLM."""
