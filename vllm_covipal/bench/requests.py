"""Generated requests: an image of noise and a question, each another, so that no cache helps."""

import random
from typing import Any

from PIL import Image

TEXT = """
what is the color of red green blue yellow small large circle square triangle left right above
below near far how many are there in this picture and which one does it stand between
"""
WORDS = TEXT.split()


def make_question(seed: int, num_words: int) -> str:
    """That many words."""
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def make_image(seed: int, width: int, height: int) -> Image.Image:
    """Noise."""
    pixels = random.Random(seed).randbytes(3 * width * height)
    return Image.frombytes("RGB", (width, height), pixels)


def make_prompt(processor: Any, question: str) -> str:
    """The question about one image, through the model's chat template if it has one."""
    if not processor.chat_template:
        return f"{processor.image_token}\n{question}"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True))
