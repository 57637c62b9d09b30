"""How much of the reduction each engine step does: integers, the same on scheduler and workers.

A prompt is reduced layer by layer once its last chunk is computed, and is not scheduled again
before its last layer is done. Everyone who owns a queue and tells it of the same ended and dropped
prompts, step by step, gets the same work: so nothing has to be sent. No torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReductionWork:
    """Layers ``[first_layer, stop_layer)`` of one request, to reduce in this step."""

    request_id: str
    first_layer: int
    stop_layer: int


class ReductionQueue:
    """Prompts that wait for their reduction, first come, first served."""

    def __init__(self, num_layers: int, tokens_per_step: int) -> None:
        """Nothing waits.

        Args:
            num_layers: of the model; each costs the same.
            tokens_per_step: prompt tokens to reduce in one step, of all layers together. One layer
                of one prompt is the least that a step does.
        """
        self._num_layers = num_layers
        self._budget = tokens_per_step * num_layers
        # Prompt tokens, and layers already done.
        self._waiting: dict[str, tuple[int, int]] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    @property
    def request_ids(self) -> list[str]:
        """Who waits, in order."""
        return list(self._waiting)

    def push(self, request_id: str, num_tokens: int) -> None:
        """A prompt of so many tokens has ended; several in one step in the order of their ids."""
        self._waiting[request_id] = (num_tokens, 0)

    def drop(self, request_id: str) -> None:
        """The request is over, or will be computed again; nothing happens if it does not wait."""
        self._waiting.pop(request_id, None)

    def advance(self) -> list[ReductionWork]:
        """One step's work."""
        work: list[ReductionWork] = []
        left = self._budget
        for request_id, (num_tokens, done) in list(self._waiting.items()):
            num_layers = min(left // num_tokens, self._num_layers - done)
            if num_layers == 0 and not work:
                num_layers = 1
            if num_layers:
                work.append(ReductionWork(request_id, done, done + num_layers))
                self._waiting[request_id] = (num_tokens, done + num_layers)
                left = max(0, left - num_layers * num_tokens)
            if done + num_layers < self._num_layers:
                break
            del self._waiting[request_id]
        return work
