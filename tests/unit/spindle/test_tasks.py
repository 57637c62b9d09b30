"""Generated tasks: a plain loop over the prompt finds the answers, and nothing else is right."""

import re
from collections import Counter

import pytest

from vllm_spindle.evaluation import needle, recall
from vllm_spindle.evaluation.protocols import INSTRUCTION_TOKENS, PROTOCOLS, make_sample, rights
from vllm_spindle.evaluation.tasks import FAMILIES, NUM_DEPTHS, make_item
from vllm_spindle.evaluation.tasks.dialect import Dialect
from vllm_spindle.evaluation.tasks.item import Sample
from vllm_spindle.evaluation.tasks.text import Text
from vllm_spindle.evaluation.tasks.words import NeedleWords, RecallWords

DIALECTS: dict[str, Dialect] = {
    "needle": NeedleWords(),
    "recall": RecallWords(),
    "text": Text(lambda text: len(text.split())),
}
LENGTHS = {"needle": 400, "recall": 400, "text": 900}
SAID = [
    (name, family)
    for name, dialect in DIALECTS.items()
    for family in FAMILIES
    if family in dialect.families
]


def _item(name: str, family: str, index: int = 0, seed: int = 5):
    return make_item(family, DIALECTS[name], prompt_tokens=LENGTHS[name], seed=seed, index=index)


def _facts(tokens: list[str], num_key: int, num_value: int) -> list[tuple[tuple, tuple]]:
    """Every ``key : value .`` in a text of words, in order."""
    facts = []
    for i, token in enumerate(tokens):
        if token == needle.IS:
            key, value = tokens[i - num_key : i], tokens[i + 1 : i + 1 + num_value]
            facts.append((tuple(key), tuple(value)))
    return facts


def _answer_needle(context: str, question: str) -> str:
    facts = dict(_facts(context.split(), 2, needle.NUM_VALUE_WORDS))
    return " ".join(facts[tuple(question.split()[1:3])])


def _answer_recall(context: str, question: str) -> str:
    values: dict[str, list[str]] = {}
    for (key,), (value,) in _facts(context.split(), 1, 1):
        values.setdefault(key, []).append(value)
    asked = [word for word in question.split() if word not in (needle.ASK, "=", ".")]
    if question.endswith("."):
        return " ? ".join(f"{key} = {values[key][0]}" for key in asked) + " ."
    found = values[asked[0]]
    if len(found) > 1:
        return " : ".join(found)
    chain = []
    while found:
        chain.append(found[0])
        found = values.get(found[0], [])
    return " = ".join(chain)


def _answer_text(context: str, question: str) -> str:
    if "VAR" in context:
        value = re.search(r"value (\d+)", question)[1]
        holding, found = {value}, []
        while True:  # rounds over all assignments, until nothing new holds the value
            new = [
                name
                for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", context)
                if source in holding and name not in holding
            ]
            if not new:
                return " ".join(found)
            found += new
            holding |= set(new)
    if "most often" in question:
        return " ".join(word for word, _ in Counter(context.split()).most_common(3))
    facts = re.findall(r"secret numbers of (\S+) is (\w+)\.", context)
    asked = question.split(" of ")[1].split(" in the text")[0].split(", ")
    return " ".join(value for key in asked for other, value in facts if other == key)


ORACLES = {"needle": _answer_needle, "recall": _answer_recall, "text": _answer_text}


@pytest.mark.parametrize(("name", "family"), SAID)
def test_answers_follow_from_the_context(name: str, family: str) -> None:
    """A plain loop that reads the context gives every expected answer."""
    for index in range(6):
        item = _item(name, family, index)
        for ask in item.asks:
            assert ORACLES[name](item.context, ask.final) == ask.answer


@pytest.mark.parametrize(("name", "family"), SAID)
def test_items_are_seeded_and_as_long_as_asked(name: str, family: str) -> None:
    """The same arguments give the same item, others another; lengths are kept to."""
    item = _item(name, family)
    assert item == _item(name, family)
    assert item.context != _item(name, family, index=1).context
    assert item.context != _item(name, family, seed=6).context
    dialect = DIALECTS[name]
    longest = max(dialect.num_tokens(ask.final) for ask in item.asks)
    num_tokens = dialect.num_tokens(item.context)
    assert 0.9 * LENGTHS[name] <= num_tokens + longest <= LENGTHS[name] + longest


@pytest.mark.parametrize(("name", "family"), [pair for pair in SAID if pair[0] != "text"])
def test_word_items_are_of_the_heldout_split(name: str, family: str) -> None:
    """No statement of an evaluation could have stood in a training sequence."""
    context = _item(name, family).context
    indices = {word: i for i, word in enumerate(needle.WORDS)}
    num_key, num_value = (2, 3) if name == "needle" else (1, 1)
    facts = _facts(context.split(), num_key, num_value)
    assert facts
    for key, value in facts:
        pair = key if name == "needle" else key + value
        assert needle.split_of(tuple(indices[word] for word in pair)) == "heldout"


@pytest.mark.parametrize("name", DIALECTS)
def test_depths_are_where_the_facts_stand(name: str) -> None:
    """The heat map's depths come in turn, and the asked fact stands there."""
    dialect = DIALECTS[name]
    for index in range(NUM_DEPTHS):
        item = _item(name, "depth", index)
        ask = item.asks[0]
        assert ask.needle_depth == pytest.approx((index + 0.5) / NUM_DEPTHS, abs=0.06)
        said = re.search(rf"(?:{needle.IS}|is) {ask.answer} ?\.", item.context)
        before = item.context[: said.start()]
        place = dialect.num_tokens(before) / dialect.num_tokens(item.context)
        assert place == pytest.approx(ask.needle_depth, abs=0.06)


@pytest.mark.parametrize("name", DIALECTS)
def test_protocols_put_the_question_where_they_say(name: str) -> None:
    """What is reduced holds the question, or not, and enough text behind it."""
    dialect, item = DIALECTS[name], _item(name, "multikey_1")
    samples = {protocol: make_sample(protocol, dialect, item, 0) for protocol in PROTOCOLS}
    first = item.asks[0]
    assert samples["question_last"].prompt.endswith(first.final)
    assert samples["question_last"].followups == ("",)
    assert samples["question_first"].prompt.startswith(first.stated)
    after = samples["instructions_after"].prompt.split(first.stated)[1]
    assert dialect.num_tokens(after) >= INSTRUCTION_TOKENS
    assert samples["after_compression"].prompt == item.context
    assert first.stated not in samples["after_compression"].prompt
    assert samples["after_compression"].followups[0].endswith(first.final)
    in_turn = samples["in_turn"]
    assert in_turn.prompt.endswith(first.final)
    assert in_turn.answers == tuple(ask.answer for ask in item.asks)
    assert len(in_turn.followups) == len(item.asks) > 1
    assert in_turn.followups[0] == ""
    for followup, ask in zip(in_turn.followups[1:], item.asks[1:], strict=True):
        assert followup.endswith(ask.final)
        assert ask.final not in in_turn.prompt


def test_exact_answers_are_scored_whole() -> None:
    """Word models: every word, in order, and nothing behind it."""
    sample = Sample("", ("",), ("stone cloud leaf",), is_exact=True)
    texts = ("stone cloud leaf", "cloud leaf", "stone cloud leaf leaf", "stone leaf cloud")
    assert [rights(sample, [text])[0] for text in texts] == [1, 0, 0, 0]


def test_texts_are_scored_by_the_words_that_came() -> None:
    """Plain text: the share of the expected words, upper case or lower."""
    sample = Sample("", ("",), ("ABCDE FGHIJ",), is_exact=False)
    assert rights(sample, ["they are abcde and FGHIJ."]) == [1.0]
    assert rights(sample, ["fghij alone"]) == [0.5]


@pytest.mark.parametrize(
    ("family", "name", "length", "said"),
    [
        ("variables", "needle", 400, "cannot be said"),
        ("nonsense", "needle", 400, "none of"),
        ("multikey_1", "needle", 60, "too short"),
        ("frequent", "text", 40, "longer prompts"),
    ],
)
def test_what_cannot_be_made_is_refused(family: str, name: str, length: int, said: str) -> None:
    """A task that the model does not know, or that does not fit, is a ValueError that says so."""
    with pytest.raises(ValueError, match=said):
        make_item(family, DIALECTS[name], prompt_tokens=length, seed=0, index=0)


def test_the_pool_gives_each_word_once() -> None:
    """Chains of one pool never meet, and run out with a clear message."""
    import random

    pool = recall.Pool(random.Random(0), "heldout")
    words = [word for _ in range(40) for word in pool.chain(3)]
    assert len(set(words)) == len(words)
    with pytest.raises(ValueError, match="vocabulary"):
        for _ in range(200):
            pool.chain(3)
