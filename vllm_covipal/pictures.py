"""Picture files as vLLM's server reads them: the same pixels in training as in a request.

Turned as EXIF says, what is transparent on white, the first frame of an animation. Modes are
Pillow's to convert, as they are there: 16 bits of grey are cut off at 255.
"""

import contextlib
import os

from PIL import Image, ImageOps

BACKGROUND = (255, 255, 255)
"""vLLM's default, ``rgba_background_color``."""


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """The picture of a file, in RGB.

    Raises:
        ValueError: if it cannot be read, naming the file.
    """
    try:
        with Image.open(path) as image:
            with contextlib.suppress(Exception):  # as vLLM: what EXIF holds may be anything
                ImageOps.exif_transpose(image, in_place=True)
            if not image.has_transparency_data:
                return image.convert("RGB")
            shown = image.convert("RGBA")
            on_white = Image.new("RGB", shown.size, BACKGROUND)
            on_white.paste(shown, mask=shown.getchannel("A"))
            return on_white
    except Exception as error:  # Pillow raises whatever a broken file leads it to
        raise ValueError(_unreadable(path, error)) from None


def check_header(path: str | os.PathLike[str]) -> None:
    """See that there is a picture, of a size that will be read, without reading its pixels.

    Raises:
        ValueError: if not, naming the file.
    """
    try:
        with Image.open(path):
            pass
    except Exception as error:
        raise ValueError(_unreadable(path, error)) from None


def _unreadable(path: str | os.PathLike[str], error: Exception) -> str:
    reason = (
        getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    )
    return f"cannot read the image {os.fspath(path)} ({reason})"
