"""Needle questions: seeded long-context retrieval prompts with one exact answer.

A prompt is a run of sentences and then a question::

    <s> coral lamp fox tulip . amber river : stone cloud leaf . amber moss : oar wolf tin . ...
    ... ? amber river =                                        -> stone cloud leaf </s>

A *needle* is a sentence ``key key : value value value .``. Some of its two key words come back in
*distractors*: sentences of the same form that share one of the two words and hold another value.
The rest is filler. Keys, values and filler are drawn from the same words, so no word is rare.

Held out by construction: a hash of the ordered pair of key words puts every pair in exactly one of
two splits, and each sentence of a prompt, needle or distractor, takes its key from the prompt's
split. So no held-out key is ever the key of a training sentence, whatever the seeds.

Words here are integers, indices into ``WORDS``; token ids are ``VOCAB`` indices.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from vllm_spindle.evaluation.needle_words import WORDS

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
STOP, IS, ASK, ANSWER = ".", ":", "?", "="
VOCAB = (PAD, BOS, EOS, UNK, STOP, IS, ASK, ANSWER, *WORDS)
FIRST_WORD_ID = VOCAB.index(WORDS[0])

NUM_VALUE_WORDS = 3
NUM_STATEMENT_TOKENS = 2 + 1 + NUM_VALUE_WORDS + 1
NUM_QUESTION_TOKENS = 4
NUM_ANSWER_TOKENS = NUM_VALUE_WORDS + 1  # the words and EOS
MAX_NEW_TOKENS = 2 * NUM_ANSWER_TOKENS  # room to be wrong in: an answer that does not end is wrong
FILLER_TOKENS = (5, 9)  # shortest and longest filler sentence, its stop included

SPLITS = ("train", "heldout")
_HELDOUT_ONE_IN = 8

Key = tuple[int, int]


@dataclass(frozen=True)
class NeedleQuestion:
    """One prompt, the only right answer, and where in the prompt it stands.

    Attributes:
        prompt: text, the question at its end. ``tokenizer(prompt)`` adds ``<s>`` in front.
        answer: the value words, joined by single blanks.
        depth: position of the asked needle's first token over the prompt's tokens. [0, 1).
        key: the two asked words.
        num_prompt_tokens: with ``<s>``.
        num_needles, num_distractors: sentences of the needle form in the prompt.
    """

    prompt: str
    answer: str
    depth: float
    key: str
    num_prompt_tokens: int
    num_needles: int
    num_distractors: int


def split_of(key: Key) -> str:
    """The split that owns an ordered pair of words: ``heldout`` for one pair in eight."""
    # splitmix64: plain integer arithmetic, so the partition never changes with a library.
    mask = (1 << 64) - 1
    z = (key[0] * len(WORDS) + key[1] + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return "heldout" if (z ^ (z >> 31)) % _HELDOUT_ONE_IN == 0 else "train"


@lru_cache(maxsize=2)
def key_partners(split: str) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """For each word, the second words and the first words it makes a key of ``split`` with."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: one of {SPLITS}")
    num_words = len(WORDS)
    seconds: list[list[int]] = [[] for _ in range(num_words)]
    firsts: list[list[int]] = [[] for _ in range(num_words)]
    for first in range(num_words):
        for second in range(num_words):
            if first != second and split_of((first, second)) == split:
                seconds[first].append(second)
                firsts[second].append(first)
    return tuple(map(tuple, seconds)), tuple(map(tuple, firsts))


def random_words(rng: random.Random, num_words: int) -> list[int]:
    """Word indices drawn with replacement. [num_words]."""
    return [int(rng.random() * len(WORDS)) for _ in range(num_words)]


def fresh_key(rng: random.Random, split: str, used: set[Key]) -> Key:
    """A key of ``split`` that is not in ``used``; adds it there."""
    seconds, _ = key_partners(split)
    while True:
        first = random_words(rng, 1)[0]
        key = (first, rng.choice(seconds[first]))
        if key not in used:
            used.add(key)
            return key


def sharing_key(rng: random.Random, split: str, key: Key, shared: int, used: set[Key]) -> Key:
    """A key of ``split`` not in ``used`` that shares word ``shared`` (0 or 1) with ``key``."""
    seconds, firsts = key_partners(split)
    while True:
        if shared == 0:
            other = (key[0], rng.choice(seconds[key[0]]))
        else:
            other = (rng.choice(firsts[key[1]]), key[1])
        if other not in used:
            used.add(other)
            return other


def statement(key: Key, value: list[int]) -> list[str]:
    """Tokens of ``key key : value value value .``. [NUM_STATEMENT_TOKENS]."""
    return [WORDS[key[0]], WORDS[key[1]], IS, *(WORDS[word] for word in value), STOP]


def question(key: Key) -> list[str]:
    """Tokens of ``? key key =``. [NUM_QUESTION_TOKENS]."""
    return [ASK, WORDS[key[0]], WORDS[key[1]], ANSWER]


def filler(rng: random.Random, num_tokens: int) -> list[list[str]]:
    """Sentences of random words with exactly ``num_tokens`` tokens together, stops included."""
    shortest, longest = FILLER_TOKENS
    sentences = []
    while num_tokens:
        length = rng.randint(shortest, longest)
        if num_tokens - length < shortest:  # the last one or two take what is left
            length = num_tokens if num_tokens <= longest else num_tokens // 2
        sentences.append([*(WORDS[word] for word in random_words(rng, length - 1)), STOP])
        num_tokens -= length
    return sentences


def make_questions(
    num_questions: int,
    prompt_tokens: int,
    *,
    seed: int,
    num_needles: int = 8,
    split: str = "heldout",
) -> list[NeedleQuestion]:
    """Questions whose prompts are exactly ``prompt_tokens`` tokens long, ``<s>`` included.

    The same arguments give the same questions. Depths are stratified: the asked needle of the
    i-th of n questions stands in a different n-th of the context, in shuffled order.

    Args:
        num_questions: how many.
        prompt_tokens: tokens of each prompt; at least ``5 + 21 * num_needles``.
        seed: any integer.
        num_needles: needles in each prompt, one of which is asked for. >= 1.
        split: ``heldout`` or ``train``.

    Raises:
        ValueError: if the prompt is too short for its needles and their distractors.
    """
    fewest = 1 + NUM_QUESTION_TOKENS + 3 * num_needles * NUM_STATEMENT_TOKENS
    if num_needles < 1 or prompt_tokens < fewest:
        raise ValueError(
            f"prompt_tokens={prompt_tokens}, num_needles={num_needles}: needs num_needles >= 1 and "
            f"prompt_tokens >= {fewest} (each needle brings two distractors)"
        )
    rng = random.Random(f"needle {split} {seed} {prompt_tokens} {num_needles}")
    strata = list(range(num_questions))
    rng.shuffle(strata)
    return [
        _make_question(rng, prompt_tokens, num_needles, split, (stratum + 0.5) / num_questions)
        for stratum in strata
    ]


def _make_question(
    rng: random.Random, prompt_tokens: int, num_needles: int, split: str, depth: float
) -> NeedleQuestion:
    num_context_tokens = prompt_tokens - 1 - NUM_QUESTION_TOKENS
    # Two distractors a needle; in long prompts one sentence in six, so that they stay in the way.
    # At most eight a needle: a pair of words has about 60 partners in a split.
    num_distractors = max(2 * num_needles, num_context_tokens // NUM_STATEMENT_TOKENS // 6)
    num_distractors = min(num_distractors, 8 * num_needles)
    used: set[Key] = set()
    needles = [fresh_key(rng, split, used) for _ in range(num_needles)]
    distractors = [
        sharing_key(rng, split, needles[i % num_needles], i // num_needles % 2, used)
        for i in range(num_distractors)
    ]
    statements = [
        statement(key, random_words(rng, NUM_VALUE_WORDS)) for key in [*needles, *distractors]
    ]
    asked, others = statements[0], statements[1:]
    num_filler_tokens = num_context_tokens - len(statements) * NUM_STATEMENT_TOKENS
    others += filler(rng, num_filler_tokens)
    rng.shuffle(others)
    before, num_tokens_before = _sentences_before(others, depth * num_context_tokens)
    sentences = [*others[:before], asked, *others[before:]]
    tokens = [token for sentence in sentences for token in sentence] + question(needles[0])
    return NeedleQuestion(
        prompt=" ".join(tokens),
        answer=" ".join(asked[3 : 3 + NUM_VALUE_WORDS]),
        depth=(1 + num_tokens_before) / prompt_tokens,
        key=" ".join(asked[:2]),
        num_prompt_tokens=1 + len(tokens),
        num_needles=num_needles,
        num_distractors=num_distractors,
    )


def _sentences_before(sentences: list[list[str]], num_tokens: float) -> tuple[int, int]:
    """How many whole sentences fit into ``num_tokens``, and the tokens they have."""
    num_tokens_before = 0
    for i, sentence in enumerate(sentences):
        if num_tokens_before + len(sentence) > num_tokens:
            return i, num_tokens_before
        num_tokens_before += len(sentence)
    return len(sentences), num_tokens_before


def is_exact(text: str, question: NeedleQuestion) -> bool:
    """Whether generated ``text`` is the whole answer, word for word, and nothing else."""
    return text.split() == question.answer.split()


def build_tokenizer():
    """The word-level tokenizer of ``VOCAB`` as a ``PreTrainedTokenizerFast``.

    Token ids are ``VOCAB`` indices; ``<s>`` goes in front; decoding joins the words with blanks.
    """
    # Imported here: the questions need neither library, and are made where only numpy is.
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
