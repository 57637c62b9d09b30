"""Who answers samples: a transformers model under a method, or a server."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_spindle.evaluation.cells import Cell
from vllm_spindle.evaluation.tasks.dialect import Dialect
from vllm_spindle.evaluation.tasks.item import Sample

NUM_REMEMBERED = 20  # prompts that a grid's next cell asks about again, by another method
CHARS_PER_TOKEN = 4  # of English, where there is no tokenizer to ask


@dataclass(frozen=True, slots=True)
class Reply:
    """Answers to one sample; bytes where they are known."""

    said: list[str]
    true_bytes: int | None = None
    full_bytes: int | None = None


class Asker(Protocol):
    """Answers the samples of cells, one at a time."""

    dialect: Dialect

    def ask(self, cell: Cell, sample: Sample) -> Reply:
        """The answers to one sample."""


def dialect_for(tokenizer: Any | None, config: Any = None) -> Dialect:
    """What a model reads: the words of a bundled one, by its vocabulary, or plain text."""
    from vllm_spindle.evaluation.needle import VOCAB
    from vllm_spindle.evaluation.tasks.text import Text
    from vllm_spindle.evaluation.tasks.words import NeedleWords, RecallWords, dialect_of

    if tokenizer is None:
        return Text(lambda text: -(-len(text) // CHARS_PER_TOKEN))
    if set(tokenizer.get_vocab()) == set(VOCAB):
        return RecallWords() if dialect_of(config) == RecallWords.name else NeedleWords()
    return Text(lambda text: len(tokenizer(text, add_special_tokens=False).input_ids))


def most_new_tokens(count_tokens: Callable[[str], int], sample: Sample) -> int:
    """Room to be wrong in: an exact answer that does not end is wrong."""
    spare = 4 if sample.is_exact else 16
    return 2 * max(map(count_tokens, sample.answers)) + spare


class Offline:
    """A transformers model, reduced by one of our methods."""

    def __init__(self, model: str, *, dtype: str, num_threads: int | None = None) -> None:
        """Load it.

        Args:
            model: folder or name.
            dtype: of the weights, as torch names it, or ``auto``.
            num_threads: torch's; None leaves it.

        Raises:
            ValueError: if the model or its tokenizer cannot be loaded.
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        from vllm_spindle.evaluation.answers import PromptReader

        disable_progress_bar()  # ours is on the screen
        if num_threads:
            torch.set_num_threads(num_threads)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model)
            self._model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"--model {model}: {str(error).splitlines()[0]}") from None
        if torch.cuda.is_available():
            self._model = self._model.to("cuda")
        self.dialect = dialect_for(self._tokenizer, self._model.config)
        self._stop_ids = stop_ids_of(self._model, self._tokenizer, self.dialect.is_exact)
        self._answerers: dict[tuple[str, float, int], Any] = {}
        self._reader = PromptReader(self._model, NUM_REMEMBERED)

    def ask(self, cell: Cell, sample: Sample) -> Reply:
        answerer = self._answerer(cell)
        prompt_ids = list(self._tokenizer(sample.prompt).input_ids)
        followups = [self._ids(text) for text in sample.followups]
        most = most_new_tokens(lambda text: len(self._ids(text)), sample)
        answers = answerer.answer(prompt_ids, followups, most, self._stop_ids)
        said = [self._tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        return Reply(said, int(answerer.true_bytes), int(answerer.full_bytes))

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _answerer(self, cell: Cell) -> Any:
        from vllm_spindle.evaluation.answers import Answerer

        key = (cell.method, cell.budget, cell.seed)
        if key not in self._answerers:
            self._answerers = {
                key: Answerer(
                    self._model,
                    method=cell.method,
                    byte_ratio=cell.budget,
                    seed=cell.seed,
                    reader=self._reader,
                )
            }
        return self._answerers[key]


def stop_ids_of(model: Any, tokenizer: Any, is_exact: bool) -> set[int]:
    """Tokens that end an answer: end of text; for text also whatever holds a line break."""
    from vllm_spindle.hf import stop_ids as own_stop_ids

    stop_ids = own_stop_ids(model) | ({tokenizer.eos_token_id} - {None})
    if not is_exact:
        every = range(len(tokenizer))
        stop_ids |= {
            i
            for i, text in zip(every, tokenizer.batch_decode([[i] for i in every]), strict=True)
            if "\n" in text
        }
    return stop_ids
