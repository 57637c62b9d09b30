"""Pictures of what is kept: kept patches as they are, the others dimmed."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

SIDE = 336
"""Pixels of a view's longer side, about: patches are whole pixels."""

DIMMED = 0.25
"""Brightness left to what is dropped."""

MARGIN = 8
LINE_HEIGHT = 20
FONT_SIZE = 14


@dataclass(frozen=True, slots=True)
class View:
    """A picture and the grid of patches over the whole of it, (rows, cols)."""

    picture: Image.Image
    grid: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Panel:
    """A labelled picture of the sheet."""

    label: str
    picture: Image.Image


def light(views: Sequence[View], kept: Collection[int]) -> Image.Image:
    """The views side by side, kept patches at full brightness, the others dimmed.

    Args:
        views: their patches are numbered through, row by row, one view after the other.
        kept: numbers of the patches to light.
    """
    lit, start = [], 0
    for view in views:
        size = view.grid[0] * view.grid[1]
        lit.append(_light_one(view, [start + place in kept for place in range(size)]))
        start += size
    width = sum(picture.width for picture in lit) + MARGIN * (len(lit) - 1)
    joined = Image.new("RGB", (width, max(picture.height for picture in lit)), "white")
    left = 0
    for picture in lit:
        joined.paste(picture, (left, 0))
        left += picture.width + MARGIN
    return joined


def draw_sheet(title: str, lines: Sequence[Sequence[Panel]]) -> Image.Image:
    """All panels under a title, a line of them after the other, each under its label."""
    cell_width = max(panel.picture.width for line in lines for panel in line)
    cell_height = max(panel.picture.height for line in lines for panel in line)
    columns = max(len(line) for line in lines)
    width = MARGIN + columns * (cell_width + MARGIN)
    line_height = LINE_HEIGHT + cell_height + MARGIN
    sheet = Image.new("RGB", (width, MARGIN + LINE_HEIGHT + len(lines) * line_height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    draw.text((MARGIN, MARGIN), _shortened(title, width - 2 * MARGIN, font), "black", font)
    for row, line in enumerate(lines):
        for column, panel in enumerate(line):
            left, top = panel_corner(row, column, (cell_width, cell_height))
            draw.text((left, top - LINE_HEIGHT), panel.label, "black", font)
            sheet.paste(panel.picture, (left, top))
    return sheet


def panel_corner(row: int, column: int, cell: tuple[int, int]) -> tuple[int, int]:
    """Left and top of a panel's picture on the sheet; cells are (width, height)."""
    left = MARGIN + column * (cell[0] + MARGIN)
    return left, MARGIN + 2 * LINE_HEIGHT + row * (LINE_HEIGHT + cell[1] + MARGIN)


def _shortened(text: str, width: int, font: Any) -> str:
    """The text in one line, its end left out where it would be wider."""
    line = " ".join(text.split())
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line.rstrip() + "..."


def _light_one(view: View, is_kept: Sequence[bool]) -> Image.Image:
    rows, cols = view.grid
    patch = max(1, round(SIDE / max(rows, cols)))
    size = (cols * patch, rows * patch)
    bright = view.picture.convert("RGB").resize(size)
    dim = bright.point(lambda value: value * DIMMED)
    mask = Image.new("L", (cols, rows))
    mask.putdata([255 if kept else 0 for kept in is_kept])
    return Image.composite(bright, dim, mask.resize(size, Image.Resampling.NEAREST))
