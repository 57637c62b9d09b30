"""Train the shapes model: three stages, one CPU thread, data made on the fly.

    .venv/bin/python models/shapes/train.py --out models/shapes

Notable:
- Everything at once from random weights stays at chance: so the stages of ``stages.py``, from
  weights that already hold the mechanism in rough form (``structure.py``). The language model's
  embeddings share the visual tokens' codes.
- In three rows of ten most visual tokens of things that are not asked for are missing, so that
  pruning shows the language model nothing new.
- Checkpoints under ``--work`` let a killed run go on where it was; ``--stage`` runs one stage only.
"""

from __future__ import annotations

import torch
from stages import Stage, Task, main
from structure import HIDDEN, NUM_ATTRIBUTES, structured_model

from vllm_covipal.evaluation.scenes import SHAPES_WORLD

STAGES = {
    "see": Stage(2400, 24, 1.5e-3, 3e-5, 0.4),
    "ask": Stage(1400, 12, 1.2e-3, 1.2e-3, 1.0),
    "join": Stage(
        *(1100, 16, 8e-4, 5e-6, 0.36),
        vision_rate=0.05,  # at the full rate the tower forgets letters: it is as good as done
        # More of what is learned last.
        weights=(("single", 0.2), ("marks", 0.1), ("several", 0.35), ("whole", 0.35)),
    ),
}
TASK = Task(SHAPES_WORLD, torch.eye(NUM_ATTRIBUTES, HIDDEN))

if __name__ == "__main__":
    main(__doc__.splitlines()[0], "shapes", STAGES, TASK, structured_model)
