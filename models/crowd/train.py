"""Train the crowd model: larger, fuller pictures, words and visual tokens of different codes.

    .venv/bin/python models/crowd/train.py --out models/crowd

Notable:
- One CPU thread, data made on the fly. The stages are those of ``models/shapes/stages.py``, on
  ``scenes.CROWD_WORLD``, from the weights of models/shapes behind a translation
  (``translation.py``): what is learned here is to see smaller marks, to read two letters, and to
  find and count among more things.
- Checkpoints under ``--work`` let a killed run go on where it was; ``--stage`` runs one stage only.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

SHAPES = Path(__file__).resolve().parents[1] / "shapes"
sys.path.insert(0, str(SHAPES))

from stages import Stage, Task, main  # noqa: E402
from translation import translated, visual_basis  # noqa: E402

from vllm_covipal.evaluation.scenes import CROWD_WORLD  # noqa: E402

WEIGHTS = (("single", 0.2), ("marks", 0.25), ("several", 0.25), ("whole", 0.3))
STAGES = {
    "see": Stage(1500, 12, 1.5e-3, 3e-5, 0.4),
    "ask": Stage(500, 8, 8e-4, 8e-4, 1.0, weights=WEIGHTS),
    "join": Stage(
        *(560, 8, 7e-4, 5e-6, 0.4),
        vision_rate=0.05,
        weights=(("single", 0.12), ("marks", 0.13), ("several", 0.3), ("whole", 0.45)),
        num_questions=28,
    ),
}
TASK = Task(CROWD_WORLD, visual_basis())


def first_weights(seed: int) -> LlavaForConditionalGeneration:
    """models/shapes, translated."""
    old = LlavaForConditionalGeneration.from_pretrained(SHAPES, dtype=torch.float32)
    return translated(old, seed)


if __name__ == "__main__":
    main(__doc__.splitlines()[0], "crowd", STAGES, TASK, first_weights)
