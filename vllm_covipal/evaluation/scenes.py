"""Generated pictures of coloured, lettered shapes on a cluttered ground.

Notable:
- A ``World`` says what kind of picture. Of ``SHAPES``: 144 x 144 pixels, 8 to 14 things, four in
  five with one letter of 5 x 7 pixels. Of ``CROWD``: 192 x 192 pixels, 16 to 24 things with two
  letters of 3 x 5 pixels, and grey blobs with letters of their own, that nobody asks for.
- A cell of 12 x 12 pixels is one patch of the vision tower: in a picture of N columns, cell
  ``row * N + column`` is the visual token of that index.
- A thing is larger than a cell and spills into its neighbours; its letters always lie in its own
  cell.
- Seeded, offline, numpy and PIL only. A scene can be had without drawing it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

NUM_ROWS = NUM_COLUMNS = 12
NUM_CELLS = NUM_ROWS * NUM_COLUMNS
CELL_PIXELS = 12
IMAGE_PIXELS = NUM_ROWS * CELL_PIXELS
LETTER_RATIO = 0.8  # of the things that bear a mark
MIN_DISTANCE_PIXELS = 17.0  # between the centres of two things
HALF_SIZES = (6.5, 7.0, 7.5, 8.0)  # of a thing, in pixels
NUM_STROKES = (6, 12)

COLORS = {
    "red": (214, 40, 40),
    "green": (40, 150, 60),
    "blue": (45, 80, 215),
    "yellow": (240, 220, 50),
    "purple": (130, 50, 165),
    "orange": (245, 140, 30),
    "cyan": (60, 210, 220),
    "pink": (250, 140, 190),
}
# Corners in units of the half size, x to the right and y down; the circle is drawn as one.
_STAR = tuple(
    (r * np.sin(np.pi * i / 5), -r * np.cos(np.pi * i / 5)) for i, r in enumerate((1.15, 0.52) * 5)
)
SHAPES: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": (),
    "square": ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
    "triangle": ((0, -1.1), (1.1, 0.85), (-1.1, 0.85)),
    "diamond": ((0, -1.15), (1.0, 0), (0, 1.15), (-1.0, 0)),
    "star": _STAR,
    "cross": (
        *((-0.42, -1), (0.42, -1), (0.42, -0.42), (1, -0.42), (1, 0.42), (0.42, 0.42)),
        *((0.42, 1), (-0.42, 1), (-0.42, 0.42), (-1, 0.42), (-1, -0.42), (-0.42, -0.42)),
    ),
    "bar": ((-1.1, -0.6), (1.1, -0.6), (1.1, 0.6), (-1.1, 0.6)),
    "arrow": ((-1, 0.1), (0, -1.1), (1, 0.1), (0.5, 0.1), (0.5, 1), (-0.5, 1), (-0.5, 0.1)),
}
_FONT = {  # rows of 5 pixels, top to bottom
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "C": "01110 10001 10000 10000 10000 10001 01110",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "F": "11111 10000 10000 11110 10000 10000 10000",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "J": "00111 00010 00010 00010 00010 10010 01100",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "M": "10001 11011 10101 10101 10001 10001 10001",
    "N": "10001 11001 10101 10101 10011 10001 10001",
    "P": "11110 10001 10001 11110 10000 10000 10000",
    "R": "11110 10001 10001 11110 10100 10010 10001",
    "S": "01111 10000 10000 01110 00001 00001 11110",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "U": "10001 10001 10001 10001 10001 10001 01110",
    "X": "10001 10001 01010 00100 01010 10001 10001",
    "Y": "10001 10001 01010 00100 00100 00100 00100",
    "Z": "11111 00001 00010 00100 01000 10000 11111",
}
_SMALL_FONT = {  # rows of 3 pixels
    "A": "010 101 111 101 101",
    "C": "011 100 100 100 011",
    "E": "111 100 111 100 111",
    "F": "111 100 111 100 100",
    "H": "101 101 111 101 101",
    "J": "001 001 001 101 111",
    "K": "101 101 110 101 101",
    "L": "100 100 100 100 111",
    "M": "101 111 111 101 101",
    "N": "110 101 101 101 101",
    "P": "111 101 111 100 100",
    "R": "110 101 110 110 101",
    "S": "011 100 010 001 110",
    "T": "111 010 010 010 010",
    "U": "101 101 101 101 111",
    "X": "101 101 010 101 101",
    "Y": "101 101 010 010 010",
    "Z": "111 001 010 100 111",
}
LETTERS = tuple(_FONT)
NUM_FIRST_LETTERS = 10  # of a mark of two letters; the others come second


def _glyphs(font: dict[str, str]) -> dict[str, np.ndarray]:
    return {
        letter: np.array([[bit == "1" for bit in row] for row in rows.split()])
        for letter, rows in font.items()
    }


_LARGE_GLYPHS, _SMALL_GLYPHS = _glyphs(_FONT), _glyphs(_SMALL_FONT)
_COLOR_NAMES, _SHAPE_NAMES = tuple(COLORS), tuple(SHAPES)
_PAD = 11  # half the side of a mask in whole pixels: the largest thing, and a subpixel shift
_STEPS_PER_PIXEL = 2  # positions of a thing are multiples of half a pixel
DULL_COLOR, DULL_SHAPE = "gray", "blob"  # of distractors; no question has these words
_ALL_COLORS = COLORS | {DULL_COLOR: (128, 128, 128)}
_ALL_SHAPES = SHAPES | {
    DULL_SHAPE: ((-1.0, -0.3), (-0.3, -1.0), (0.7, -0.8), (1.0, 0.2), (0.3, 1.0), (-0.8, 0.7))
}


@dataclass(frozen=True)
class World:
    """A kind of picture.

    Attributes:
        num_columns: and as many rows, in cells.
        num_things, num_distractors: least, most.
        marks: what things bear, no two alike in a picture.
        is_small: marks are of 3 x 5 pixels a letter, not 5 x 7.
        max_jitter_pixels: of a thing's centre around its cell's, either way.
        cells_per_place: cells that share a row's or a column's name.
        max_count: of things of a kind; larger counts are never asked for.
    """

    name: str
    num_columns: int
    num_things: tuple[int, int]
    num_distractors: tuple[int, int]
    marks: tuple[str, ...]
    is_small: bool
    max_jitter_pixels: float
    cells_per_place: int
    max_count: int

    @property
    def num_cells(self) -> int:
        """Cells of a picture, its visual tokens."""
        return self.num_columns**2

    @property
    def image_pixels(self) -> int:
        """Width and height of a picture."""
        return self.num_columns * CELL_PIXELS


SHAPES_WORLD = World("shapes", NUM_COLUMNS, (8, 14), (0, 0), LETTERS, False, 2.0, 1, 6)
CROWD_WORLD = World(
    "crowd",
    num_columns=16,
    num_things=(16, 24),
    num_distractors=(4, 8),
    marks=tuple(
        one + other
        for one, other in product(LETTERS[:NUM_FIRST_LETTERS], LETTERS[NUM_FIRST_LETTERS:])
    ),
    is_small=True,
    max_jitter_pixels=1.0,
    cells_per_place=2,
    max_count=4,
)
WORLDS = {world.name: world for world in (SHAPES_WORLD, CROWD_WORLD)}


@dataclass(frozen=True)
class Thing:
    """One object of a picture.

    Attributes:
        color, shape: keys of ``COLORS`` and ``SHAPES``.
        letter: the mark, one or two of ``LETTERS``, or None for a thing without.
        x, y: centre, in pixels from the left and from the top.
        half_size: in pixels.
        num_columns: of its picture, in cells.
    """

    color: str
    shape: str
    letter: str | None
    x: float
    y: float
    half_size: float
    num_columns: int = NUM_COLUMNS

    @property
    def row(self) -> int:
        """Row of the cell that holds the centre, 0 at the top."""
        return int(self.y // CELL_PIXELS)

    @property
    def column(self) -> int:
        """Column of the cell that holds the centre, 0 at the left."""
        return int(self.x // CELL_PIXELS)

    @property
    def cell(self) -> int:
        """Index of the visual token that holds the centre."""
        return self.row * self.num_columns + self.column


@dataclass(frozen=True)
class Scene:
    """What a picture shows, and the seed of the rest of it."""

    things: tuple[Thing, ...]
    seed: int
    distractors: tuple[Thing, ...] = ()
    world: World = SHAPES_WORLD


def make_scene(seed: int, world: World = SHAPES_WORLD) -> Scene:
    """The scene of this seed in a world: things and distractors, no two marks alike."""
    rng = np.random.default_rng((seed, 0))
    num_things = int(rng.integers(*world.num_things, endpoint=True))
    count = num_things
    if world.num_distractors[1]:
        count += int(rng.integers(*world.num_distractors, endpoint=True))
    # Uneven shares, so that a picture has several things of one colour and some colours not at all.
    color_shares = rng.dirichlet(np.ones(len(COLORS)))
    shape_shares = rng.dirichlet(np.ones(len(SHAPES)))
    colors = rng.choice(len(COLORS), count, p=color_shares)
    shapes = rng.choice(len(SHAPES), count, p=shape_shares)
    marks = rng.permutation(len(world.marks))[:count]
    is_lettered = rng.random(count) < LETTER_RATIO
    is_lettered[0] = True  # every picture has something to read
    half_sizes = rng.choice(HALF_SIZES, count)
    centres: list[tuple[float, float]] = []
    while len(centres) < count:
        row, column = rng.integers(world.num_columns), rng.integers(world.num_columns)
        steps = world.max_jitter_pixels * _STEPS_PER_PIXEL
        jitter = rng.integers(-steps, steps, 2, endpoint=True) / _STEPS_PER_PIXEL
        x = float((column + 0.5) * CELL_PIXELS + jitter[0])
        y = float((row + 0.5) * CELL_PIXELS + jitter[1])
        if all((x - a) ** 2 + (y - b) ** 2 >= MIN_DISTANCE_PIXELS**2 for a, b in centres):
            centres.append((x, y))
    things = tuple(
        Thing(
            color=_COLOR_NAMES[colors[i]] if i < num_things else DULL_COLOR,
            shape=_SHAPE_NAMES[shapes[i]] if i < num_things else DULL_SHAPE,
            letter=world.marks[marks[i]] if is_lettered[i] else None,
            x=centres[i][0],
            y=centres[i][1],
            half_size=float(half_sizes[i]),
            num_columns=world.num_columns,
        )
        for i in range(count)
    )
    return Scene(things[:num_things], seed, things[num_things:], world)


@cache
def _mask(shape: str, half_size: float, shift_x: float, shift_y: float) -> np.ndarray:
    """Coverage of a shape by pixel, [22, 22] float32 in 0..1, centre at 11 plus the shift."""
    scale = 8
    image = Image.new("L", (2 * _PAD * scale, 2 * _PAD * scale))
    draw = ImageDraw.Draw(image)
    centre_x, centre_y = (_PAD + shift_x) * scale, (_PAD + shift_y) * scale
    size = half_size * scale
    if shape == "circle":
        box = (centre_x - size, centre_y - size, centre_x + size, centre_y + size)
        draw.ellipse(box, fill=255)
    else:
        draw.polygon(
            [(centre_x + x * size, centre_y + y * size) for x, y in _ALL_SHAPES[shape]], fill=255
        )
    return np.asarray(image.reduce(scale), dtype=np.float32) / 255


def _placed_mask(thing: Thing) -> tuple[slice, slice, np.ndarray]:
    """Rows and columns of the picture, and the coverage there, cut at the picture's edge."""
    left, top = int(thing.x) - _PAD, int(thing.y) - _PAD
    mask = _mask(thing.shape, thing.half_size, thing.x % 1, thing.y % 1)
    x0, y0 = max(left, 0), max(top, 0)
    edge = thing.num_columns * CELL_PIXELS
    x1, y1 = min(left + 2 * _PAD, edge), min(top + 2 * _PAD, edge)
    return slice(y0, y1), slice(x0, x1), mask[y0 - top : y1 - top, x0 - left : x1 - left]


def coverage(thing: Thing) -> dict[int, float]:
    """Cell -> share of the cell that the thing covers, in 0..1, its own cell first."""
    rows, columns, mask = _placed_mask(thing)
    ys, xs = np.nonzero(mask)
    cell_rows, cell_columns = (ys + rows.start) // CELL_PIXELS, (xs + columns.start) // CELL_PIXELS
    cells = cell_rows * thing.num_columns + cell_columns
    areas = np.bincount(cells, weights=mask[ys, xs], minlength=thing.cell + 1) / CELL_PIXELS**2
    others = [int(cell) for cell in np.nonzero(areas)[0] if cell != thing.cell]
    return {cell: float(areas[cell]) for cell in [thing.cell, *others]}


def draw(scene: Scene) -> Image.Image:
    """The picture, RGB, square. The same scene gives the same pixels."""
    size = scene.world.image_pixels
    rng = np.random.default_rng((scene.seed, 1))
    ground = rng.uniform(70, 190) + rng.uniform(-18, 18, 3)
    slope = rng.uniform(-30, 30, 2)
    ramp = np.linspace(-0.5, 0.5, size)
    canvas = ground + (slope[0] * ramp[:, None] + slope[1] * ramp[None, :])[:, :, None]
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    _draw_strokes(rng, image, ground)
    pixels = np.array(image, dtype=np.float32)
    for thing in (*scene.things, *scene.distractors):
        _draw_thing(rng, pixels, thing, _SMALL_GLYPHS if scene.world.is_small else _LARGE_GLYPHS)
    pixels += rng.uniform(2, 9) * rng.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _draw_strokes(rng: np.random.Generator, image: Image.Image, ground: np.ndarray) -> None:
    """Thin dull lines across the ground: they belong to nothing."""
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(*NUM_STROKES, endpoint=True)):
        ends = rng.uniform(0, image.width, 4)
        tint = np.clip(ground + rng.uniform(-60, 60) + rng.uniform(-12, 12, 3), 0, 255)
        draw.line(list(ends), fill=tuple(int(c) for c in tint), width=int(rng.integers(1, 3)))


def _draw_thing(
    rng: np.random.Generator, pixels: np.ndarray, thing: Thing, glyphs: dict[str, np.ndarray]
) -> None:
    """One thing and its mark onto ``pixels``, [height, width, 3] float32."""
    rows, columns, mask = _placed_mask(thing)
    color = np.array(_ALL_COLORS[thing.color], dtype=np.float32)
    color = np.clip(color + rng.uniform(-14, 14, 3), 0, 255).astype(np.float32)
    patch = pixels[rows, columns]
    patch += mask[:, :, None] * (color - patch)
    if thing.letter is not None:
        luminance = float(color @ (0.299, 0.587, 0.114))
        height, width = glyphs[thing.letter[0]].shape
        full_width = (width + 1) * len(thing.letter) - 1
        top, left = round(thing.y - height / 2), round(thing.x - full_width / 2)
        ink = 15.0 if luminance > 120 else 240.0
        for i, letter in enumerate(thing.letter):
            start = left + i * (width + 1)
            pixels[top : top + height, start : start + width][glyphs[letter]] = ink
