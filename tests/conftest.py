"""One torch thread: the tests share a small machine. Hypothesis' profile is in pyproject.toml."""

import torch

torch.set_num_threads(1)
