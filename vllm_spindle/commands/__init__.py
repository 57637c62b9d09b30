"""The subcommands of ``vllm-spindle``, one module each: ``add_arguments`` and ``run``."""
