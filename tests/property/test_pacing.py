"""What holds for every sequence of prompts that end and leave."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_spindle.core.pacing import ReductionQueue

EVENTS = st.lists(
    st.tuples(st.lists(st.integers(1, 500), max_size=4), st.integers(0, 30)), max_size=30
)


@given(EVENTS, st.integers(1, 12), st.integers(0, 600))
def test_every_layer_once_in_order_and_within_the_bound(
    steps: list[tuple[list[int], int]], num_layers: int, tokens_per_step: int
) -> None:
    """A step reduces so many tokens of all layers, or one layer; each request, all its layers."""
    queue = ReductionQueue(num_layers, tokens_per_step)
    lengths: dict[str, int] = {}
    done: dict[str, int] = {}
    finished: list[str] = []
    dropped: set[str] = set()
    steps = steps + [([], 30)] * (num_layers * sum(len(ends) for ends, _ in steps))
    for ends, victim in steps:
        for num_tokens in ends:
            request_id = f"r{len(lengths):03}"
            lengths[request_id], done[request_id] = num_tokens, 0
            queue.push(request_id, num_tokens)
        if victim < len(queue.request_ids):
            dropped.add(queue.request_ids[victim])
            queue.drop(queue.request_ids[victim])
        waiting = queue.request_ids
        work = queue.advance()
        assert bool(work) == bool(waiting)
        assert [each.request_id for each in work] == waiting[: len(work)]
        spent = 0
        for each in work:
            assert each.first_layer == done[each.request_id] < each.stop_layer <= num_layers
            done[each.request_id] = each.stop_layer
            spent += (each.stop_layer - each.first_layer) * lengths[each.request_id]
            if each.stop_layer == num_layers:
                finished.append(each.request_id)
                assert each.request_id not in queue
        is_one_layer = len(work) == 1 and work[0].stop_layer - work[0].first_layer == 1
        assert spent <= tokens_per_step * num_layers or is_one_layer
    assert queue.request_ids == []
    assert finished == [each for each in lengths if each not in dropped]


def test_what_fits_is_done_at_once() -> None:
    """Prompts that a step has room for wait for nobody; the next one starts with what is left."""
    queue = ReductionQueue(4, 100)
    for name, num_tokens in (("a", 60), ("b", 30), ("c", 20)):
        queue.push(name, num_tokens)
    first = [(w.request_id, w.first_layer, w.stop_layer) for w in queue.advance()]
    assert first == [("a", 0, 4), ("b", 0, 4), ("c", 0, 2)]
    assert queue.request_ids == ["c"]
    assert [(w.first_layer, w.stop_layer) for w in queue.advance()] == [(2, 4)]
