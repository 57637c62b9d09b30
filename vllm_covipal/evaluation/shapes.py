"""Questions about the pictures of ``scenes.py``, with their answers and the cells asked for.

    USER: <image>
    what letter is on the red circle? ASSISTANT:      ->   K

Notable:
- Every question has one right answer, a word or a mark: things are named by something no other
  thing of the picture has (a colour, a shape, both, a mark, a place).
- ``TYPES``: one thing (``single``), the letters on it (``marks``), two things (``several``), all
  things (``whole``).
- In ``scenes.CROWD_WORLD`` a mark is two words (``K Z``), and a row's or column's name is that of
  two cells; all worlds share words and forms.
- ``cells``: the visual tokens that an oracle keeps. ``touched_cells``: those that an ablation
  takes away, so that nothing of what was asked for is left to see.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from vllm_covipal.evaluation import scenes
from vllm_covipal.evaluation.scenes import COLORS, LETTERS, SHAPES, Scene, Thing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TYPES = ("single", "marks", "several", "whole")
PROMPT = "USER: <image>\n{question} ASSISTANT:"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for item in message['content'] if item['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ ' </s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MAX_NEW_TOKENS = 4  # an answer is one word and </s>; a longer one is wrong
COLUMN_NAMES = tuple("abcdefghijkl")
ROW_NAMES = tuple(str(1 + row) for row in range(scenes.NUM_ROWS))
PLURALS = {shape: {"cross": "crosses"}.get(shape, f"{shape}s") for shape in SHAPES}
RELATIONS: dict[str, Callable[[Thing, Thing], int]] = {
    # > 0 if it holds, in cells; pairs less than MIN_RELATION_CELLS apart are not asked for
    "left of": lambda one, other: other.column - one.column,
    "right of": lambda one, other: one.column - other.column,
    "above": lambda one, other: other.row - one.row,
    "below": lambda one, other: one.row - other.row,
}
MIN_RELATION_CELLS = 2

PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
USER, ASSISTANT = "USER:", "ASSISTANT:"
SPECIAL = (PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT)
_WORDS = (
    "what do share is are how many there any the in of on at same none and object objects color "
    "shape letter row column left right above below yes no ? 0"
)
VOCAB = (*SPECIAL, *_WORDS.split(), *ROW_NAMES, *COLUMN_NAMES, *LETTERS)
VOCAB = (*VOCAB, *COLORS, *SHAPES, *PLURALS.values())


@dataclass(frozen=True)
class Question:
    """One question about one scene.

    Attributes:
        type: of ``TYPES``.
        kind: finer than the type: what is asked for, such as ``color`` or ``count color``.
        text: the question alone, without the chat template.
        answer: words of ``VOCAB``.
        asked: indices into ``scene.things`` of the things the answer follows from.
    """

    scene: Scene
    type: str
    kind: str
    text: str
    answer: str
    asked: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The text a server takes beside the picture."""
        return PROMPT.format(question=self.text)

    @cached_property
    def cells(self) -> tuple[int, ...]:
        """The visual tokens of the asked things' centres, ascending."""
        return tuple(sorted(self.scene.things[i].cell for i in self.asked))

    @cached_property
    def touched_cells(self) -> tuple[int, ...]:
        """Every visual token that sees a pixel of an asked thing, ascending."""
        things = (self.scene.things[i] for i in self.asked)
        return tuple(sorted({cell for thing in things for cell in scenes.coverage(thing)}))


def make_questions(
    num_questions: int, *, seed: int, world: scenes.World = scenes.SHAPES_WORLD
) -> list[Question]:
    """Questions over scenes of their own, the types in turn. The same arguments give the same."""
    rng = random.Random(f"shapes {seed}")
    questions = []
    for i in range(num_questions):
        # Training draws scenes of seeds below 2**40 (models/shapes/train.py).
        asker = Asker(scenes.make_scene(2**40 + rng.getrandbits(40), world), rng)
        questions.append(asker.ask(TYPES[i % len(TYPES)]))
    return questions


def is_exact(text: str, question: Question) -> bool:
    """Whether generated ``text`` is the answer and nothing else."""
    return text.split() == question.answer.split()


class Asker:
    """Draws questions about one scene."""

    def __init__(self, scene: Scene, rng: random.Random) -> None:
        self.scene, self.rng = scene, rng
        self._names = [list(self._names_of(thing)) for thing in scene.things]

    def ask(self, type: str) -> Question:
        """A question of ``type``; every scene has one of each."""
        ways = {  # a way named twice is taken twice as often
            "single": (self._attribute, self._attribute, self._place),
            "marks": (self._letter,),
            "several": (self._relation, self._share),
            "whole": (self._count_color, self._count_shape, self._exists),
        }[type]
        while True:  # a way may find nothing to ask for, such as two things of one colour
            question = self.rng.choice(ways)()
            if question is not None:
                return question

    def _names_of(self, thing: Thing) -> Iterator[tuple[str, str]]:
        """(what the name tells, the name): each is true of this thing alone."""
        others = [other for other in self.scene.things if other is not thing]
        if all(other.color != thing.color for other in others):
            yield "color", f"the {thing.color} object"
        if all(other.shape != thing.shape for other in others):
            yield "shape", f"the {thing.shape}"
        if all((other.color, other.shape) != (thing.color, thing.shape) for other in others):
            yield "color shape", f"the {thing.color} {thing.shape}"
        if thing.letter is not None:
            yield "letter", f"the {' '.join(thing.letter)}"
        if all(self._place_of(other) != self._place_of(thing) for other in others):
            column, row = self._place_of(thing)
            yield "place", f"column {COLUMN_NAMES[column]} row {ROW_NAMES[row]}"

    def _place_of(self, thing: Thing) -> tuple[int, int]:
        """Indices of the names of its column and row."""
        size = self.scene.world.cells_per_place
        return thing.column // size, thing.row // size

    def _name(self, i: int, *, without: tuple[str, ...]) -> str | None:
        """A name of thing ``i`` that tells none of ``without``; None if it has no such name."""
        names = [
            name for tells, name in self._names[i] if not any(word in tells for word in without)
        ]
        return self.rng.choice(names) if names else None

    def _one(self) -> int:
        return self.rng.randrange(len(self.scene.things))

    def _two(self) -> tuple[int, int]:
        one, other = self.rng.sample(range(len(self.scene.things)), 2)
        return one, other

    def _attribute(self) -> Question | None:
        """The colour or the shape of one thing."""
        i, attribute = self._one(), self.rng.choice(("color", "shape"))
        name = self._name(i, without=(attribute,))
        if name is None:
            return None
        verb = "is at" if name.startswith("column") else "is"
        answer = getattr(self.scene.things[i], attribute)
        text = f"what {attribute} {verb} {name}?"
        return Question(self.scene, "single", attribute, text, answer, (i,))

    def _place(self) -> Question | None:
        """The row or the column of one thing."""
        i, attribute = self._one(), self.rng.choice(("row", "column"))
        name = self._name(i, without=("place",))
        if name is None:
            return None
        column, row = self._place_of(self.scene.things[i])
        answer = ROW_NAMES[row] if attribute == "row" else COLUMN_NAMES[column]
        text = f"what {attribute} is {name} in?"
        return Question(self.scene, "single", attribute, text, answer, (i,))

    def _letter(self) -> Question | None:
        """The letter on one thing, or the letters."""
        i = self._one()
        letter, name = self.scene.things[i].letter, self._name(i, without=("letter",))
        if letter is None or name is None:
            return None
        preposition = "at" if name.startswith("column") else "on"
        if len(letter) == 1:
            text = f"what letter is {preposition} {name}?"
            return Question(self.scene, "marks", "letter", text, letter, (i,))
        text = f"what is {preposition} {name}?"
        return Question(self.scene, "marks", "letters", text, " ".join(letter), (i,))

    def _relation(self) -> Question | None:
        """Whether one thing lies left of, right of, above or below another."""
        i, j = self._two()
        relation = self.rng.choice(tuple(RELATIONS))
        one, other = self._name(i, without=("place",)), self._name(j, without=("place",))
        margin = RELATIONS[relation](self.scene.things[i], self.scene.things[j])
        if one is None or other is None or abs(margin) < MIN_RELATION_CELLS:
            return None
        answer = "yes" if margin > 0 else "no"
        text = f"is {one} {relation} {other}?"
        return Question(self.scene, "several", "relation", text, answer, (i, j))

    def _share(self) -> Question | None:
        """The colour or the shape that two things have in common; as likely ``none``."""
        attribute, is_shared = self.rng.choice(("color", "shape")), self.rng.random() < 0.5
        for _ in range(20):
            i, j = self._two()
            one, other = (getattr(self.scene.things[k], attribute) for k in (i, j))
            if (one == other) is is_shared:
                break
        else:
            return None
        names = [self._name(k, without=(attribute, "place")) for k in (i, j)]
        if None in names:
            return None
        answer = one if is_shared else "none"
        text = f"what {attribute} do {names[0]} and {names[1]} share?"
        return Question(self.scene, "several", f"shared {attribute}", text, answer, (i, j))

    def _count_color(self) -> Question | None:
        return self._count("color", tuple(COLORS), lambda color: f"{color} objects")

    def _count_shape(self) -> Question | None:
        return self._count("shape", tuple(SHAPES), lambda shape: PLURALS[shape])

    def _count(
        self, attribute: str, values: tuple[str, ...], plural: Callable[[str], str]
    ) -> Question | None:
        """How many things have a colour or a shape; the picture's counts are as likely each."""
        matches = {
            value: tuple(
                i for i, thing in enumerate(self.scene.things) if getattr(thing, attribute) == value
            )
            for value in values
        }
        limit = self.scene.world.max_count
        count = self.rng.choice(sorted({len(m) for m in matches.values() if len(m) <= limit}))
        value = self.rng.choice([v for v in values if len(matches[v]) == count])
        text = f"how many {plural(value)} are there?"
        return Question(self.scene, "whole", f"count {attribute}", text, str(count), matches[value])

    def _exists(self) -> Question | None:
        """Whether any thing has both a colour and a shape; the picture has each by itself."""
        things = self.scene.things
        here = sorted({(thing.color, thing.shape) for thing in things})
        absent = sorted({(a.color, b.shape) for a in things for b in things} - set(here))
        answer = self.rng.choice(("yes", "no"))
        if answer == "no" and not absent:
            return None
        color, shape = self.rng.choice(here if answer == "yes" else absent)
        asked = tuple(
            i
            for i, thing in enumerate(things)
            if (thing.color, thing.shape) == (color, shape)
            or (answer == "no" and (thing.color == color or thing.shape == shape))
        )
        text = f"is there any {color} {shape}?"
        return Question(self.scene, "whole", "exists", text, answer, asked)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer of ``VOCAB``, with LLaVA-1.5's chat template.

    Token ids are ``VOCAB`` indices; ``<s>`` goes in front; decoding joins the words with blanks.
    """
    # Imported here: the questions need neither library.
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[IMAGE, USER, ASSISTANT],
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
