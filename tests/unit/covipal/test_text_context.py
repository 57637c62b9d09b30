"""Which text goes with an image: by hand, and through real-shaped chat templates."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vllm_covipal.core.text_context import special_ids, text_context, turn_end_sequences

IMAGE, END, ROLE = 9, 7, 8

LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "<s>{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} [/INST]"
    "{% else %} {{ message['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
)
SPECIAL = ["<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]


def _tokenizer(template: str | None, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """A token for every byte, and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, extra_special_tokens=SPECIAL
    )
    tokenizer.chat_template = template
    return tokenizer


def _chat(*turns: tuple[str, str]) -> list[dict[str, object]]:
    messages = []
    for i, (role, text) in enumerate(turns):
        parts: list[dict[str, str]] = [{"type": "text", "text": text}]
        if i == 0:
            parts.insert(0, {"type": "image"})
        messages.append({"role": role, "content": parts})
    return messages


def _context(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, object]], prompted: bool = True
) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted)
    ids = tokenizer.encode(text, add_special_tokens=False)
    images = tokenizer.convert_tokens_to_ids(["<image>", "<|image_pad|>"])
    image_end = 1 + next(i for i, token in enumerate(ids) if token in images)
    ends = turn_end_sequences(tokenizer)
    return tokenizer.decode(text_context(ids, image_end, special_ids(tokenizer), ends, 1000))


@pytest.mark.parametrize(
    ("prompt", "image_end", "max_tokens", "expected"),
    [
        ([1, IMAGE, 2, 3, END, ROLE, 4], 2, 100, [1, 2, 3]),
        ([1, IMAGE, 2, 3, END, ROLE, 4], 2, 2, [2, 3]),
        ([1, IMAGE, 2, 3, END, ROLE, 4], 2, 0, []),
        ([1, END, ROLE, 2, IMAGE, 3], 5, 100, [1, END, ROLE, 2, 3]),
        ([1, IMAGE, 2, END, 3], 2, 100, [1, 2, END, 3]),
        ([IMAGE, END, ROLE], 1, 100, []),
        ([1, IMAGE, 2, END], 2, 100, [1, 2, END]),
        ([1, IMAGE, 2, IMAGE, 3, END, ROLE], 2, 100, [1, 2, 3]),
        ([IMAGE, 5, 2], 1, 100, [2]),
    ],
)
def test_worked_examples(
    prompt: list[int], image_end: int, max_tokens: int, expected: list[int]
) -> None:
    """The turn ends at the whole sequence END ROLE, not at half of it, not before the image."""
    assert text_context(prompt, image_end, {IMAGE, 5}, [[END, ROLE]], max_tokens) == expected


def test_the_first_of_several_ends_counts() -> None:
    """Whichever end comes first; an empty one is none."""
    assert text_context([IMAGE, 1, 2, 3], 1, {IMAGE}, [[3], [2, 3], []], 100) == [1]


@pytest.mark.parametrize(("image_end", "max_tokens"), [(-1, 1), (4, 1), (1, -1)])
def test_what_is_out_of_range_is_refused(image_end: int, max_tokens: int) -> None:
    """An index beyond the prompt is a bug of the caller's."""
    with pytest.raises(ValueError, match="must be"):
        text_context([1, 2, 3], image_end, (), [], max_tokens)


TEMPLATES = [(LLAVA, "</s>"), (CHATML, "<|im_end|>"), (INST, "</s>")]


@pytest.mark.parametrize(("template", "eos"), TEMPLATES, ids=["llava", "chatml", "inst"])
def test_the_context_is_the_question(template: str, eos: str) -> None:
    """It holds the question and not the assistant's header, with it in the prompt or without."""
    tokenizer = _tokenizer(template, eos)
    question = _chat(("user", "Which letter is red?"))
    context = _context(tokenizer, question)
    assert context.strip().endswith("Which letter is red?")
    assert "assistant" not in context.lower().replace("helpful assistant", "")
    assert _context(tokenizer, question, prompted=False).strip() == context.strip()


@pytest.mark.parametrize(("template", "eos"), TEMPLATES, ids=["llava", "chatml", "inst"])
def test_a_growing_chat_keeps_its_context(template: str, eos: str) -> None:
    """An answer, another question, and another: the image's context stays token for token."""
    tokenizer = _tokenizer(template, eos)
    turns = [("user", "Which letter is red?"), ("assistant", "B"), ("user", "And which is blue?")]
    turns += [("assistant", "C"), ("user", "Sure?")]
    contexts = {_context(tokenizer, _chat(*turns[:n])) for n in (1, 3, 5)}
    assert len(contexts) == 1


def test_chatml_ends() -> None:
    """The end of a turn and the assistant's header, with and without a space before."""
    tokenizer = _tokenizer(CHATML, "<|im_end|>")
    ends = [tokenizer.decode(ids) for ids in turn_end_sequences(tokenizer)]
    header = "<|im_start|>assistant"
    assert ends == ["<|im_end|>", " <|im_end|>", header, " " + header]


def test_llava_ends() -> None:
    """Nothing follows the content but the assistant's header."""
    tokenizer = _tokenizer(LLAVA)
    ends = [tokenizer.decode(ids) for ids in turn_end_sequences(tokenizer)]
    assert ends == ["ASSISTANT:", " ASSISTANT:", "</s>"]


@pytest.mark.parametrize("template", [None, "", "{{ raise_exception('no') }}", "nothing"])
def test_without_a_usable_template_the_end_of_text_ends_a_turn(template: str | None) -> None:
    """A template that is absent, fails, or forgets the content."""
    tokenizer = _tokenizer(template)
    assert turn_end_sequences(tokenizer) == [[tokenizer.eos_token_id]]


def test_special_tokens_are_no_text() -> None:
    """Markers of turns and of media never reach the pruning module."""
    tokenizer = _tokenizer(CHATML)
    assert set(tokenizer.convert_tokens_to_ids(SPECIAL)) <= special_ids(tokenizer)
    assert tokenizer.convert_tokens_to_ids("A") not in special_ids(tokenizer)
