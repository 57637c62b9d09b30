"""Compiled twins of core: numba on the CPU, Triton for CUDA. Each has a slow twin and a test that
they agree. Import them after vLLM has started: its kernel registration trips over numba's modules.
"""
