"""The needle questions: what makes an exact-match number on them worth something."""

import random
import runpy
from pathlib import Path

import pytest

from vllm_spindle.evaluation import needle

SHIPPED = Path(__file__).parents[2] / "models" / "needle"
LENGTHS = (173, 256, 511, 1500, 2048)


def statements_of(prompt: str) -> dict[tuple[str, str], list[str]]:
    """Key words -> value words, for every sentence of the needle form."""
    sentences = [sentence.split() for sentence in prompt.split(needle.STOP)]
    return {tuple(s[:2]): s[3:] for s in sentences if len(s) > 2 and s[2] == needle.IS}


def words_of_key(key: tuple[str, str]) -> tuple[int, int]:
    return needle.WORDS.index(key[0]), needle.WORDS.index(key[1])


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(SHIPPED)


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_prompts_have_the_promised_tokens(tokenizer, num_tokens):
    """A prompt is exactly as long as asked, by the shipped tokenizer, with no unknown word."""
    for question in needle.make_questions(4, num_tokens, seed=3):
        ids = tokenizer(question.prompt).input_ids
        assert len(ids) == num_tokens == question.num_prompt_tokens
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids


def test_shipped_tokenizer_is_the_built_one(tokenizer):
    """The files in models/needle say the same as the code: ids are VOCAB indices."""
    assert tokenizer.convert_ids_to_tokens(range(len(needle.VOCAB))) == list(needle.VOCAB)
    assert needle.build_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_decoding_gives_the_text_back(tokenizer):
    """Text in, the same text out, blanks included."""
    question = needle.make_questions(1, 256, seed=0)[0]
    ids = tokenizer(question.prompt).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == question.prompt


def test_held_out_keys_are_never_training_keys():
    """Every key of a prompt, asked or not, belongs to the prompt's split and to no other."""
    seen = {split: set() for split in needle.SPLITS}
    for split in needle.SPLITS:
        for question in needle.make_questions(40, 1024, seed=5, split=split):
            keys = {words_of_key(key) for key in statements_of(question.prompt)}
            assert {needle.split_of(key) for key in keys} == {split}
            seen[split] |= keys
    assert not seen["train"] & seen["heldout"]
    assert min(map(len, seen.values())) > 1000


def test_training_sequences_ask_for_training_keys_only(monkeypatch):
    """The recipe's own sequences hold no held-out key, asked or stated, crowded or not."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(SHIPPED))
    recipe = runpy.run_path(str(SHIPPED / "train.py"))
    rng = random.Random(7)
    for crowd_ratio in (0.0, 0.7):
        tokens, starts, is_answer = recipe["make_sequence"](rng, 2048, crowd_ratio)
        assert len(tokens) == len(is_answer) == 2048
        sentences = [tokens[a:b] for a, b in zip(starts, [*starts[1:], 2048], strict=True)]
        stated = {tuple(s[:2]) for s in sentences if s[2:3] == [needle.IS]}
        asked = {tuple(s[1:3]) for s in sentences if s[0] == needle.ASK and len(s) > 3}
        assert len(asked) > 10
        assert asked <= stated
        assert {needle.split_of(words_of_key(key)) for key in stated} == {"train"}


def test_the_split_is_frozen():
    """The partition is the one the shipped model was trained on: one pair in eight held out."""
    num_words = len(needle.WORDS)
    heldout = [
        (a, b)
        for a in range(num_words)
        for b in range(num_words)
        if needle.split_of((a, b)) == "heldout"
    ]
    assert heldout[:3] == [(0, 6), (0, 29), (0, 33)]
    assert len(heldout) / num_words**2 == pytest.approx(1 / 8, abs=0.002)


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_distractors_share_a_key_word_with_the_asked_needle(num_tokens):
    """Both words of the asked key come back in other keys, so one word is not enough to find it."""
    for question in needle.make_questions(10, num_tokens, seed=1):
        first, second = question.key.split()
        statements = statements_of(question.prompt)
        others = [key for key in statements if key != (first, second)]
        assert len(statements) == question.num_needles + question.num_distractors
        assert any(key[0] == first for key in others)
        assert any(key[1] == second for key in others)


def test_the_answer_stands_in_the_prompt_once_and_the_question_at_its_end():
    """The asked key has one value in the prompt, and the prompt ends by asking for it."""
    for question in needle.make_questions(20, 512, seed=9):
        assert question.prompt.endswith(f" ? {question.key} =")
        padded = " " + question.prompt
        assert padded.count(f" {question.key} : {question.answer} .") == 1
        assert padded.count(f" {question.key} :") == 1
        assert len(question.answer.split()) == needle.NUM_VALUE_WORDS


def test_depths_cover_the_context():
    """Of n questions, one asks into every n-th of the context (to within a sentence)."""
    num_tokens = 2048
    questions = needle.make_questions(20, num_tokens, seed=2)
    for question in questions:
        before = f" {question.prompt}".split(f" {question.key} : ")[0]
        assert question.depth == pytest.approx((1 + len(before.split())) / num_tokens, abs=1e-9)
    for i, depth in enumerate(sorted(question.depth for question in questions)):
        assert abs(depth - (i + 0.5) / 20) < 0.02


def test_a_seed_repeats_and_another_seed_does_not():
    """Same arguments, same questions; another seed shares no prompt."""
    first = needle.make_questions(8, 512, seed=4)
    assert first == needle.make_questions(8, 512, seed=4)
    other = needle.make_questions(8, 512, seed=5)
    assert not {question.prompt for question in first} & {question.prompt for question in other}


def test_is_exact_can_fail():
    """Only the whole answer counts: a missing, wrong, extra or late word does not."""
    question = needle.make_questions(1, 256, seed=0)[0]
    words = question.answer.split()
    assert needle.is_exact(f" {question.answer}", question)
    wrong = "coral" if words[0] != "coral" else "lamp"
    for text in (
        "",
        " ".join(words[1:]),
        " ".join(words[:-1]),
        " ".join([wrong, *words[1:]]),
        " ".join([*words, wrong]),
        " ".join(words[::-1]) if words[0] != words[-1] else "",
        question.answer.replace(" ", ""),
    ):
        assert not needle.is_exact(text, question)


@pytest.mark.parametrize(
    ("num_tokens", "num_needles", "split"),
    [(172, 8, "heldout"), (256, 0, "heldout"), (256, 8, "test")],
)
def test_impossible_requests_are_refused(num_tokens, num_needles, split):
    """A prompt that cannot hold its needles, and an unknown split, are errors."""
    with pytest.raises(ValueError, match="needles=|split="):
        needle.make_questions(1, num_tokens, seed=0, num_needles=num_needles, split=split)
