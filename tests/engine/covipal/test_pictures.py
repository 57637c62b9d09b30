"""Pictures in training have the pixels of pictures in a request."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.engine


def test_as_vllm_reads_them(tmp_path: Path) -> None:
    """Turned, transparent, of other modes, animated: bit for bit."""
    import numpy as np
    from PIL import Image
    from vllm.multimodal.media.image import ImageMediaIO

    from vllm_covipal.pictures import read_picture

    values = np.random.default_rng(0).integers(0, 256, (12, 20, 4), dtype=np.uint8)
    clear = Image.fromarray(values)
    plain = clear.convert("RGB")
    exif = plain.getexif()
    exif[0x0112] = 8
    plain.save(tmp_path / "turned.jpg", exif=exif)
    plain.save(tmp_path / "turned.png", exif=exif)
    for mode in ("RGB", "L", "1", "P", "RGBA", "LA"):
        clear.convert(mode).save(tmp_path / f"{mode}.png")
    clear.convert("P").save(tmp_path / "clear.gif", transparency=3)
    plain.save(tmp_path / "key.png", transparency=(1, 2, 3))
    plain.convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(values.view(np.uint16)[..., 0]).save(tmp_path / "deep.png")
    plain.save(tmp_path / "moving.gif", save_all=True, append_images=[clear.convert("L")])
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 13
    for path in paths:
        theirs = ImageMediaIO().load_file(path).media
        ours = read_picture(path)
        assert (ours.mode, ours.size) == (theirs.mode, theirs.size), path.name
        assert ours.tobytes() == theirs.tobytes(), path.name
