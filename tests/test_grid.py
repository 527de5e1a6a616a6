"""The comparison grid: every picture in its place, every label inside its column."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor

from guidancekit.grid import CELL_RANGE, PAPER, Label, Layout, _width, cell_size, draw_grid, wrap

COLOURS = ["red", "lime", "blue", "cyan", "magenta", "yellow"]


def _boxes(sheet: Image.Image) -> dict[str, tuple[int, int, int, int]]:
    """The bounding box of every pure colour of COLOURS in the sheet."""
    pixels = np.asarray(sheet)
    masks = {name: (pixels == ImageColor.getrgb(name)).all(axis=-1) for name in COLOURS}
    boxes = {name: Image.fromarray(mask).getbbox() for name, mask in masks.items()}
    return {name: box for name, box in boxes.items() if box}


def test_every_picture_stands_in_its_row_and_column():
    pictures = [[Image.new("RGB", (64, 64), c) for c in COLOURS[3 * r : 3 * r + 3]] for r in (0, 1)]
    rows = [Label("a prompt", (f"seed {r}",)) for r in (0, 1)]
    columns = [Label(name, ("w = 4", "60 evaluations")) for name in ("cfg", "apg", "fdg")]
    sheet = draw_grid(pictures, rows, columns, Label("model", ("30 steps",)))
    boxes = _boxes(sheet)
    for r in (0, 1):
        lefts = [boxes[colour][0] for colour in COLOURS[3 * r : 3 * r + 3]]
        assert lefts == sorted(set(lefts))
    for c in range(3):
        above, below = boxes[COLOURS[c]], boxes[COLOURS[3 + c]]
        assert above[0] == below[0]
        assert above[3] <= below[1]
    for left, top, right, bottom in boxes.values():
        assert (right - left, bottom - top) == (192, 192)  # 64 enlarged by 3
        assert right <= sheet.width
        assert bottom <= sheet.height


def test_an_unfinished_cell_stays_empty():
    picture = Image.new("RGB", (200, 200), "red")
    labels = [Label("a"), Label("b")]
    sheet = draw_grid([[picture, None]], [Label("row")], labels)
    assert list(_boxes(sheet)) == ["red"]
    assert sheet.size == draw_grid([[picture, picture]], [Label("row")], labels).size


def test_labels_never_touch_the_pictures():
    words = "supercalifragilisticexpialidocious " * 12
    picture = Image.new("RGB", (64, 64), "red")
    bare = draw_grid([[picture]], [Label("")], [Label("")])
    full = draw_grid([[picture]], [Label(words, (words,))], [Label(words, (words,))], Label(words))
    box = _boxes(full)["red"]
    assert (box[2] - box[0], box[3] - box[1]) == (192, 192)
    assert full.crop(box).getcolors() == bare.crop(_boxes(bare)["red"]).getcolors()


def test_row_labels_taller_than_their_pictures_make_room():
    words = "supercalifragilisticexpialidocious " * 12
    pictures = [[Image.new("RGB", (64, 64), colour)] for colour in ("red", "blue")]
    sheet = draw_grid(pictures, [Label(words), Label(words)], [Label("cfg")])
    second_row = _boxes(sheet)["blue"][1]
    assert second_row - _boxes(sheet)["red"][1] > 192 + 12
    for bottom in (second_row - 1, sheet.height):  # between the rows, and below the last
        strip = sheet.crop((0, bottom - 8, sheet.width, bottom))
        assert strip.getcolors() == [(8 * sheet.width, ImageColor.getrgb(PAPER))]


def test_feet_of_the_columns_are_in_line():
    pictures = [[Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]]
    bare = draw_grid(pictures, [Label("")], [Label("a", ("b", "c")), Label("d")])
    feet = draw_grid(
        pictures, [Label("")], [Label("a", ("b", "c"), "foot"), Label("d", (), "foot")]
    )
    left, right = (_boxes(feet)[colour][0] for colour in ("red", "blue"))
    assert feet.height > bare.height
    words = [feet.crop((x, 0, x + 192, _boxes(feet)["red"][1])) for x in (left, right)]
    height = words[0].height
    assert words[0].crop((0, height - 30, 192, height)).getcolors() != [(30 * 192, (255,) * 3)]
    assert words[0].crop((0, height - 30, 192, height)) == words[1].crop(
        (0, height - 30, 192, height)
    )


def test_wrong_shapes_are_refused():
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match=r"found 1 rows of \[1\] pictures for 1 row labels and 2"):
        draw_grid([[picture]], [Label("row")], [Label("a"), Label("b")])


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_cells_keep_the_shape_and_the_range(width, height):
    w, h = cell_size((width, height))
    assert max(w, h) <= CELL_RANGE[1]
    assert max(w, h) >= CELL_RANGE[0] or max(width, height) >= CELL_RANGE[0]
    assert abs(w * height - h * width) <= max(width, height)  # up to rounding of the shorter side
    if max(width, height) < CELL_RANGE[0]:
        assert w % width == h % height == 0  # small pictures by a whole factor


@given(st.text(max_size=80), st.sampled_from([13, 16]), st.integers(40, 300))
def test_wrapped_lines_fit_and_lose_nothing(text, size, width):
    lines = wrap(text, size, width)
    assert "".join("".join(line.split()) for line in lines) == "".join(text.split())
    assert all(_width(line, size) <= width or len(line) == 1 for line in lines)


def test_cells_are_found_where_they_are_drawn():
    marks = [[Image.new("RGB", (64, 48), (40 * r, 60 * c, 9)) for c in range(3)] for r in range(2)]
    rows = [Label("one"), Label("two " * 60)]  # the second label is higher than its cells
    layout = Layout(marks, rows, [Label("a"), Label("b"), Label("c")])
    sheet = layout.draw()
    seen = set()
    for x in range(0, sheet.width, 3):
        for y in range(0, sheet.height, 3):
            found = layout.cell_at(x, y)
            if found is not None:
                assert sheet.getpixel((x, y)) == (40 * found[0], 60 * found[1], 9)
                seen.add(found)
    assert len(seen) == 6
    assert layout.cell_at(0, 0) is None
