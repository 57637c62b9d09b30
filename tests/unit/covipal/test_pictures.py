"""Picture files of every kind are read as vLLM's server reads them, or named."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vllm_covipal.pictures import check_header, read_picture

RED = (200, 10, 20)


def test_a_turned_picture_stands_upright(tmp_path: Path) -> None:
    """EXIF's orientation, which cameras write, is part of the picture."""
    image = Image.new("RGB", (40, 20), RED)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").size == (20, 40)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    """Whatever colour lies under it, and however the file says so."""
    image = Image.new("RGBA", (8, 8), (*RED, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    image.convert(mode).save(tmp_path / "clear.png")
    pixels = np.asarray(read_picture(tmp_path / "clear.png"))
    assert (pixels[:, :4] == 0).all() and (pixels[:, 4:] == 255).all()


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "I;16", "YCbCr"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    """Black stays black."""
    suffix = "png" if mode in ("L", "1", "I;16") else "jpg"
    Image.new("RGB", (8, 8)).convert("L" if mode == "I;16" else mode).convert(mode).save(
        tmp_path / f"a.{suffix}"
    )
    image = read_picture(tmp_path / f"a.{suffix}")
    assert image.mode == "RGB" and not np.asarray(image).any()


def test_an_animation_is_its_first_frame(tmp_path: Path) -> None:
    """As in a request."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((0, 0, 0), (255, 255, 255))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert not np.asarray(read_picture(tmp_path / "moving.gif")).any()


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent, a folder, no picture, too large; cut off only where its pixels are read."""
    Image.new("RGB", (64, 64), RED).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:60])
    (tmp_path / "none.png").write_bytes(b"no picture")
    (tmp_path / "bild\u00e4r.png").write_bytes(whole)
    assert read_picture(tmp_path / "bild\u00e4r.png").size == (64, 64)
    for name in ("gone.png", ".", "none.png"):
        for read in (read_picture, check_header):
            with pytest.raises(ValueError, match="cannot read the image ") as said:
                read(tmp_path / name)
            assert str(tmp_path) in str(said.value) and "\n" not in str(said.value)
    check_header(tmp_path / "cut.png")
    with pytest.raises(ValueError, match=r"cannot read the image .*cut\.png"):
        read_picture(tmp_path / "cut.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for read in (read_picture, check_header):
        with pytest.raises(ValueError, match=r"whole\.png \(Image size .* exceeds limit"):
            read(tmp_path / "whole.png")
