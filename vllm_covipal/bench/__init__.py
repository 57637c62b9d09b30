"""Benchmarks that run stock and plugin side by side, in one process tree, in one run."""
