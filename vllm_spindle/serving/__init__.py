"""Real ``vllm serve`` processes, started, asked and measured over HTTP. Imports no vLLM."""
