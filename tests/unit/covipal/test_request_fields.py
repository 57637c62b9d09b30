"""What keys an item in every cache, and what travels with it."""

import pytest

pytest.importorskip("vllm")

from dataclasses import replace

from vllm_covipal.engine.request_fields import PruningRequest, pack, take

REQUEST = PruningRequest(keep_ratio=0.25, text_ids=(5, 6), media_hash="abc")


def test_hash_tells_everything_that_may_change_the_rows() -> None:
    """Image, ratio, text and selector: each alone makes another key; the same makes the same."""
    keys = [
        REQUEST.cache_hash("ppm-1"),
        REQUEST.cache_hash("ppm-2"),
        replace(REQUEST, keep_ratio=0.5).cache_hash("ppm-1"),
        replace(REQUEST, text_ids=(5, 7)).cache_hash("ppm-1"),
        replace(REQUEST, media_hash="abd").cache_hash("ppm-1"),
    ]
    assert len(set(keys)) == 5
    assert replace(REQUEST).cache_hash("ppm-1") == keys[0]


def test_kept_embeddings_are_keyed_by_the_image_alone() -> None:
    """Another question and ratio find them; another image does not."""
    other = replace(REQUEST, keep_ratio=0.5, text_ids=())
    requests = [REQUEST, other, replace(REQUEST, media_hash="abd")]
    modality, items, rest = take({**pack("image", requests), "pixel_values": 1})
    assert modality == "image"
    assert rest == {"pixel_values": 1}
    assert items[0].media_key == items[1].media_key != items[2].media_key
    assert [item.keep_ratio for item in items] == [0.25, 0.5, 0.25]
    assert [item.text_ids.tolist() for item in items] == [[5, 6], [], [5, 6]]


def test_an_unpruned_batch_carries_nothing() -> None:
    """Its fields go to the stock model as they came."""
    assert take({"pixel_values": 1}) == ("", [], {"pixel_values": 1})
