"""Training of pruning modules: what ``vllm-covipal train`` runs."""
