"""Compiled twins of core: numba on the CPU. Each has a slow twin and a test that they agree."""
