"""What a task makes: a context, and what can be asked of it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ask:
    """One question in the three forms that the protocols need.

    Attributes:
        stated: the question alone, for the start of a prompt or its middle.
        final: the question with its cue: whoever has read the context and this must answer.
        cue: what asks for the answer once ``stated`` was read. Word models need the question again.
        answer: text. Exact answers are this, word for word; of others every word must come.
        needle_depth: where the asked sentence stands, over the context's tokens; None if there are
            several. [0, 1).
    """

    stated: str
    final: str
    cue: str
    answer: str
    needle_depth: float | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One context.

    Attributes:
        context: text, questions not in it.
        asks: one or more, each of other sentences.
    """

    context: str
    asks: tuple[Ask, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt as a protocol puts it, what is read behind it, and the only right answers.

    Attributes:
        prompt: read, then reduced.
        followups: each read behind what came before, then answered. ``""``, in first place only:
            the question is in the prompt.
        answers: one a follow-up.
        is_exact: whether an answer must be word for word the same and then end; else it must hold
            every word of the right one (RULER's measure: the share of words).
        depth: of the first question's needle, see ``Ask``.
    """

    prompt: str
    followups: tuple[str, ...]
    answers: tuple[str, ...]
    is_exact: bool
    depth: float | None = None
