"""Stage-1 labels against plain loops."""

import math

import pytest
import torch

from vllm_covipal.core.labels import label_rows, received_attention, scaled_labels

SIZES = {"num_tokens": 12, "num_visual": 5, "media_end": 7, "num_prompt": 10}


def test_rows_are_what_their_names_say() -> None:
    """The last N_v (the paper's), those after the picture, the one that says the answer's first."""
    assert list(label_rows("literal", **SIZES)) == [7, 8, 9, 10, 11]
    assert list(label_rows("after", **SIZES)) == [7, 8, 9, 10, 11]
    assert list(label_rows("literal", **SIZES | {"num_visual": 7})) == [5, 6, 7, 8, 9, 10, 11]
    assert list(label_rows("literal", **SIZES | {"num_visual": 50})) == list(range(12))
    assert list(label_rows("last", **SIZES)) == [9]
    with pytest.raises(ValueError, match=r"literal, after, last, got 'all'"):
        label_rows("all", **SIZES)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [range(2, 9), range(8, 9), range(0, 3)])
def test_attention_is_summed_over_heads_and_rows(rows: range) -> None:
    """Four query heads on two kv heads, causal, written out."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4, 9, 8, generator=generator)
    keys = torch.randn(2, 9, 8, generator=generator)
    columns = torch.tensor([1, 2, 5])
    expected = [0.0, 0.0, 0.0]
    for head in range(4):
        for row in rows:
            scores = [float(queries[head, row] @ keys[head // 2, j]) * 0.3 for j in range(row + 1)]
            total = sum(math.exp(score) for score in scores)
            for c, column in enumerate(columns.tolist()):
                if column <= row:
                    expected[c] += math.exp(scores[column]) / total
    got = received_attention(queries, keys, rows, columns, 0.3)
    assert torch.allclose(got, torch.tensor(expected), atol=1e-5)


def test_scalings() -> None:
    """Of sums over ten weights each."""
    labels = torch.tensor([0.5, 0.01, 5.0, 0.5])
    scale = {name: scaled_labels(labels, name, num_summed=10) for name in ("none", "mean", "log")}
    assert torch.equal(scale["none"], labels)
    assert torch.allclose(scale["mean"], labels / 10)
    assert torch.allclose(scale["log"], (labels / 10).log())
    standard = scaled_labels(labels, "zscore", num_summed=10)
    assert standard.mean().abs() < 1e-6 and (standard.square().mean() - 1).abs() < 1e-5
    assert scaled_labels(labels, "rank", num_summed=10).tolist() == pytest.approx(
        [1 / 3, 0, 1, 2 / 3]
    )
    assert standard.argsort(stable=True).tolist() == labels.argsort(stable=True).tolist()


def test_equal_labels_scale_to_nothing() -> None:
    """A picture that gets no attention anywhere has no order to learn, and no NaN."""
    for name in ("log", "zscore"):
        assert torch.isfinite(scaled_labels(torch.zeros(4), name, num_summed=3)).all()
    assert scaled_labels(torch.ones(1), "zscore", num_summed=3).tolist() == [0]
