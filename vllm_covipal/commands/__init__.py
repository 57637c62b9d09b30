"""What `vllm-covipal` does, one module per subcommand."""
