"""Slow, obvious twins of the selectors and of the pruning module, from the definitions.

Shapes: C candidates, K kept, T text tokens, D width, m own width. float64 throughout. Nothing
here imports the code under test.
"""

import math
from typing import Any

import torch
from torch import Tensor


def cosine(one: Tensor, other: Tensor) -> float:
    """Cosine of two vectors."""
    return float(one @ other / (one.norm() * other.norm()))


def farthest_points(rows: Tensor, num_kept: int) -> list[int]:
    """Max-min greedy over 1 - cosine; the first pick is the row with the loneliest neighbour."""
    rows, places = rows.double(), range(rows.shape[0])
    distance = [[1 - cosine(rows[a], rows[b]) for b in places] for a in places]
    picks = [max(places, key=lambda a: min(distance[a][b] for b in places if b != a))]
    while len(picks) < num_kept:
        left = [a for a in places if a not in picks]
        picks.append(max(left, key=lambda a: min(distance[a][b] for b in picks)))
    return picks


def relevance(rows: Tensor, text: Tensor) -> list[float]:
    """Mean cosine of each row with the text, from 0 for the least to 1 for the most."""
    mean = [sum(cosine(row, token) for token in text.double()) / len(text) for row in rows.double()]
    return [(value - min(mean)) / (max(mean) - min(mean)) + 1e-6 for value in mean]


def greedy_determinant(rows: Tensor, quality: list[float], num_kept: int) -> list[int]:
    """One row after the other, each making the determinant of the kernel the largest.

    The first of equals, to nine digits.
    """
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    weight = torch.tensor(quality, dtype=torch.float64)
    kernel = weight[:, None] * (unit @ unit.T) * weight[None, :]
    picks: list[int] = []
    while len(picks) < num_kept:
        left = [a for a in range(rows.shape[0]) if a not in picks]

        def log_determinant(a: int) -> float:
            chosen = [*picks, a]  # noqa: B023
            return round(float(torch.linalg.slogdet(kernel[chosen][:, chosen]).logabsdet), 9)

        picks.append(max(left, key=log_determinant))
    return picks


def pruning_scores(weights: dict[str, Tensor], config: Any, visual: Tensor, text: Tensor) -> Tensor:
    """A pruning module's scores of one item, row by row and head by head. [C]."""
    w = {name: value.double() for name, value in weights.items()}

    def linear(name: str, rows: Tensor) -> Tensor:
        return rows @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, rows: Tensor) -> Tensor:
        spread = rows.var(dim=1, unbiased=False, keepdim=True)
        centred = (rows - rows.mean(dim=1, keepdim=True)) / (spread + 1e-5).sqrt()
        return centred * w[f"{name}.weight"] + w[f"{name}.bias"]

    def embed(rows: Tensor) -> Tensor:
        rows = rows.double()
        return linear("project", rows / rows.square().mean(dim=1, keepdim=True).sqrt())

    tokens = [w["null_text"] + w["text_type"]]
    for i, token in enumerate(embed(text)):
        distance, half = len(text) - 1 - i, config.width // 2
        angles = [distance * 10000 ** (-2 * j / config.width) for j in range(half)]
        waves = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
        tokens.append(token + w["text_type"] + w["position_gain"] * waves.double())
    rows = torch.cat([embed(visual) + w["visual_type"], torch.stack(tokens)])
    num_visual, head_size = visual.shape[0], config.width // config.num_heads
    for b in range(config.num_blocks):
        name = f"blocks.{b}"
        normed = norm(f"{name}.attention_norm", rows)
        only_text = b == 0 and config.text_first
        keyed = normed[num_visual:] if only_text else normed
        query = linear(f"{name}.query", normed)
        key, value = linear(f"{name}.key_value", keyed).chunk(2, dim=1)
        mixed = torch.empty_like(rows)
        for h in range(config.num_heads):
            of_head = slice(h * head_size, (h + 1) * head_size)
            logits = query[:, of_head] @ key[:, of_head].T / math.sqrt(head_size)
            mixed[:, of_head] = logits.softmax(dim=1) @ value[:, of_head]
        rows = rows + linear(f"{name}.output", mixed)
        inner = linear(f"{name}.mlp.0", norm(f"{name}.mlp_norm", rows))
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        rows = rows + linear(f"{name}.mlp.2", inner)
    return linear("head", norm("head_norm", rows[:num_visual])).squeeze(1)
