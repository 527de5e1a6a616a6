"""A labelled grid of pictures: rows are prompts and seeds, columns are methods."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT, RULE = "#ffffff", "#1a1d21", "#6b7280", "#e3e6ea"
MARGIN, GAP, PADDING = 28, 12, 16  # pixels: around the grid, between cells, beside texts
LABEL_WIDTH = 190  # pixels: the column of row labels
CELL_RANGE = (160, 320)  # pixels: the longer side of a cell
LINE = 1.35  # line height over font size


@dataclass(frozen=True)
class Label:
    """A heading with smaller lines below it; `foot` stands last, in line with its neighbours'."""

    title: str
    details: tuple[str, ...] = ()
    foot: str = ""


def cell_size(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) at which a picture of `size` is shown: small ones by a whole factor."""
    low, high = CELL_RANGE
    longest = max(size)
    factor = math.ceil(low / longest) if longest < low else min(1.0, high / longest)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


class Layout:
    """Where everything lies in a grid of `pictures[row][column]` with its labels, in pixels.

    `corner` says what all pictures share. None leaves a cell empty. Pictures may differ in size:
    each is fitted into the cell of the largest.
    """

    def __init__(
        self,
        pictures: Sequence[Sequence[Image.Image | None]],
        rows: Sequence[Label],
        columns: Sequence[Label],
        corner: Label = Label(""),
    ) -> None:
        if len(pictures) != len(rows) or any(len(line) != len(columns) for line in pictures):
            raise ValueError(
                f"found {len(pictures)} rows of {sorted({len(line) for line in pictures})} "
                f"pictures for {len(rows)} row labels and {len(columns)} column labels."
            )
        self.pictures = pictures
        shown = [cell_size(image.size) for line in pictures for image in line if image is not None]
        self.width = max((w for w, _ in shown), default=CELL_RANGE[0])
        self.height = max((h for _, h in shown), default=CELL_RANGE[0])
        self.heads = [_Text(label, self.width) for label in columns]
        self.sides = [_Text(label, LABEL_WIDTH - PADDING) for label in rows]
        self.corner = _Text(corner, LABEL_WIDTH - PADDING)
        head_height = max(text.height for text in (*self.heads, self.corner)) + PADDING
        left, top = MARGIN + LABEL_WIDTH, MARGIN + head_height
        self.lefts = [left + c * (self.width + GAP) for c in range(len(columns))]
        self.tops = [top]
        for side in self.sides:
            self.tops.append(self.tops[-1] + max(self.height, side.height) + GAP)
        self.size = (
            left + len(columns) * (self.width + GAP) - GAP + MARGIN,
            (self.tops.pop() - GAP + MARGIN),
        )

    def cell_at(self, x: float, y: float) -> tuple[int, int] | None:
        """(row, column) of the cell at a point of the sheet; None between and beside cells."""
        rows = [r for r, top in enumerate(self.tops) if top <= y < top + self.height]
        columns = [c for c, left in enumerate(self.lefts) if left <= x < left + self.width]
        return (rows[0], columns[0]) if rows and columns else None

    def draw(self) -> Image.Image:
        """The sheet."""
        sheet = Image.new("RGB", self.size, PAPER)
        draw = ImageDraw.Draw(sheet)
        self.corner.draw(draw, MARGIN, MARGIN)
        for head, x in zip(self.heads, self.lefts, strict=True):
            head.draw(draw, x, MARGIN, bottom=self.tops[0] - PADDING)
        for side, line, y in zip(self.sides, self.pictures, self.tops, strict=True):
            side.draw(draw, MARGIN, y)
            for image, x in zip(line, self.lefts, strict=True):
                draw.rectangle((x - 1, y - 1, x + self.width, y + self.height), outline=RULE)
                if image is not None:
                    cell = _fit(image)
                    dx, dy = (self.width - cell.width) // 2, (self.height - cell.height) // 2
                    sheet.paste(cell, (x + dx, y + dy))
        return sheet


def draw_grid(
    pictures: Sequence[Sequence[Image.Image | None]],
    rows: Sequence[Label],
    columns: Sequence[Label],
    corner: Label = Label(""),
) -> Image.Image:
    """One picture with all `pictures[row][column]`, labelled at the top and on the left."""
    return Layout(pictures, rows, columns, corner).draw()


class _Text:
    """A label set in lines of at most `width` pixels."""

    def __init__(self, label: Label, width: int) -> None:
        self.lines = [(line, 16, INK) for line in wrap(label.title, 16, width)]
        for detail in label.details:
            self.lines += [(line, 13, FAINT) for line in wrap(detail, 13, width)]
        self.foot = [(line, 13, FAINT) for line in wrap(label.foot, 13, width)]
        self.height = _height(self.lines) + _height(self.foot)

    def draw(self, draw: ImageDraw.ImageDraw, x: int, y: int, bottom: int = 0) -> None:
        """The lines from `y` on, and the foot so that it ends at `bottom`."""
        for lines, start in ((self.lines, y), (self.foot, bottom - _height(self.foot))):
            for line, size, colour in lines:
                draw.text((x, start), line, fill=colour, font=_font(size))
                start += round(size * LINE)


def wrap(text: str, size: int, width: int) -> list[str]:
    """`text` in lines that fit `width` pixels at font `size`; a word that is too long is broken."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        if line and _width(f"{line} {word}", size) <= width:
            line = f"{line} {word}"
            continue
        if line:
            lines.append(line)
        while len(word) > 1 and _width(word, size) > width:
            lengths = range(len(word) - 1, 1, -1)
            cut = next((n for n in lengths if _width(word[:n], size) <= width), 1)
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    return [*lines, line] if line else lines


def _fit(image: Image.Image) -> Image.Image:
    size = cell_size(image.size)
    if size == image.size:
        return image.convert("RGB")
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _height(lines: Sequence[tuple[str, int, str]]) -> int:
    return sum(round(size * LINE) for _, size, _ in lines)


def _width(text: str, size: int) -> float:
    return _font(size).getlength(text)


@functools.cache
def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
