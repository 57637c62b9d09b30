"""SpindleKV for vLLM: a KV cache that keeps less. Importing this package changes nothing."""
