"""Renders scenes: signed distance functions on a grid of twice the size, averaged down.

Coordinates: the picture spans [-1, 1] in x (to the right) and y (down); an object's own frame has
its centre at the origin, about unit radius, and y up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .world import BACKGROUNDS, COLOURS, SHAPES, TEXTURES, Scene, Thing

SIZE = 64  # pixels a side
GRID = 2 * SIZE  # samples a side
RADIUS = {"small": 0.24, "large": 0.41}
PERIOD = 0.2  # of stripes and dots, in picture units: 6.4 pixels
SHADOW = (0.05, 0.07)  # offset in picture units
REACH = 0.51  # how far the largest object extends from its centre; its shadow, 0.13 further
WINDOW = 76  # samples a side of the part of the grid that an object and its shadow can touch

THING_DRAWS = 9  # x, y, radius, angle, three of colour, phase and angle of the texture
SCENE_DRAWS = 2 * THING_DRAWS + 4  # three of background colour, one of its gradient
CHUNK = 8  # scenes rendered at once: few enough for the arrays to stay in cache

Array = np.ndarray


def render(scene: Scene, rng: np.random.Generator) -> Array:
    """One picture, uint8 of shape (64, 64, 3)."""
    return render_batch([scene], rng)[0]


def render_batch(scenes: Sequence[Scene], rng: np.random.Generator) -> Array:
    """Pictures of fully specified scenes, uint8 of shape (len(scenes), 64, 64, 3).

    Every scene takes the same number of draws from `rng`, so a batch equals its scenes rendered
    one by one from the same generator.
    """
    pictures = np.empty((len(scenes), SIZE, SIZE, 3), np.uint8)
    for start in range(0, len(scenes), CHUNK):
        chunk = scenes[start : start + CHUNK]
        jitter = rng.random((len(chunk), SCENE_DRAWS)).astype(np.float32) * 2 - 1
        pictures[start : start + len(chunk)] = _render_chunk(chunk, jitter)
    return pictures


# --- shapes: (x, y) in the object's frame -> signed distance, negative inside ---------------------


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 0.92


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 0.8


def _triangle(x: Array, y: Array) -> Array:
    y = y + 0.2
    return np.maximum(np.abs(x) * 0.866 + y * 0.5, -y) - 0.56


def _star(x: Array, y: Array) -> Array:
    """Five points: fold into one half point, then the line from tip to notch."""
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, y) + sector / 2) % sector - sector / 2)
    radius = np.hypot(x, y)
    tip, notch = 1.08, 0.5
    nx, ny = notch * np.sin(sector / 2), notch * np.cos(sector / 2)
    edge = np.hypot(nx, tip - ny)
    across = radius * np.sin(angle) * (tip - ny) + (radius * np.cos(angle) - tip) * nx
    return across / edge


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - 0.68) - 0.27


def _cross(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.minimum(x, y) - 0.32, np.maximum(x, y) - 0.95)


def _heart(x: Array, y: Array) -> Array:
    x, y = np.abs(x) * 0.62, y * 0.62 + 0.56
    lobe = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2) / 4
    below = np.maximum(x + y, 0) / 2
    point = np.minimum(x**2 + (y - 1) ** 2, (x - below) ** 2 + (y - below) ** 2)
    return np.where(x + y > 1, lobe, np.sqrt(point) * np.sign(x - y)) / 0.62


def _moon(x: Array, y: Array) -> Array:
    return np.maximum(np.hypot(x, y) - 0.95, 0.78 - np.hypot(x - 0.45, y - 0.2))


DISTANCE = dict(
    zip(SHAPES, (_circle, _square, _triangle, _star, _ring, _cross, _heart, _moon), strict=True)
)


# --- pictures -------------------------------------------------------------------------------------

_AXIS = (np.arange(GRID, dtype=np.float32) + 0.5) / GRID * 2 - 1
_X, _Y = _AXIS[None, None, :], _AXIS[None, :, None]


def _render_chunk(scenes: Sequence[Scene], jitter: Array) -> Array:
    draws = jitter[:, -4:]
    ground = np.array([BACKGROUNDS[s.background] for s in scenes], np.float32) / 255
    ground = ground + 0.025 * draws[:, :3]
    light = 1 - (0.05 + 0.03 * draws[:, 3, None, None]) * (_Y + 0.5 * _X)
    canvas = ground[:, None, None, :] * light[..., None]  # (n, GRID, GRID, 3)

    for slot in range(2):
        here = [i for i, scene in enumerate(scenes) if slot < len(scene.objects)]
        if here:
            own = jitter[here, slot * THING_DRAWS : (slot + 1) * THING_DRAWS]
            _paint([scenes[i] for i in here], slot, own, [canvas[i] for i in here])

    rows = canvas[:, 0::2] + canvas[:, 1::2]
    pixels = (rows[:, :, 0::2] + rows[:, :, 1::2]) / 4
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def _paint(scenes: Sequence[Scene], slot: int, draws: Array, canvases: list[Array]) -> None:
    """Paint each scene's object number `slot` and its shadow on its canvas, in place."""
    things = [scene.objects[slot] for scene in scenes]
    column = np.s_[:, None, None]
    cx, cy = _centres(scenes, slot, draws)
    left, top = (
        np.clip((v + 1 - REACH) * (GRID / 2), 0, GRID - WINDOW).astype(int) for v in (cx, cy)
    )
    x = _AXIS[left[:, None] + np.arange(WINDOW)][:, None, :]
    y = _AXIS[top[:, None] + np.arange(WINDOW)][:, :, None]
    x, y = x - cx[column], y - cy[column]  # from the centre, in picture units, y down
    radius = np.array([RADIUS[t.size] for t in things], np.float32) * (1 + 0.07 * draws[:, 2])
    radius = radius[column]
    turn = 0.22 * draws[:, 3][column]
    cos, sin = np.cos(turn), np.sin(turn)

    def distance(dx: float = 0.0, dy: float = 0.0) -> Array:
        """Signed distance to every object in picture units, the objects moved by (dx, dy)."""
        u, v = (x - dx) / radius, (dy - y) / radius
        u, v = cos * u + sin * v, cos * v - sin * u
        result = np.empty_like(u)
        for shape, function in DISTANCE.items():
            own = [i for i, thing in enumerate(things) if thing.shape == shape]
            if own:
                result[own] = function(u[own], v[own])
        return result * radius

    cover = np.clip(0.5 - distance() * (GRID / 2), 0, 1)
    shadow = 0.38 * np.clip(0.5 - distance(*SHADOW) / 0.12, 0, 1)

    colour = np.array([COLOURS[t.colour] for t in things], np.float32) / 255
    colour = np.clip(colour + 0.035 * draws[:, 4:7], 0, 1)
    second = second_shade(colour)
    mark = _texture(things, draws[:, 7][column], draws[:, 8][column], x, y)

    shade = 1 - 0.16 * (x + y) / radius  # lit from the upper left
    paint = colour[:, None, None] + mark[..., None] * (second - colour)[:, None, None]
    paint = paint * shade[..., None]
    for i, canvas in enumerate(canvases):
        part = canvas[top[i] : top[i] + WINDOW, left[i] : left[i] + WINDOW]
        part *= 1 - shadow[i, ..., None]
        part += cover[i, ..., None] * (paint[i] - part)


def second_shade(colour: Array) -> Array:
    """The colour of stripes and dots on colours (n, 3) from 0 to 1: darker on light ones."""
    bright = colour @ np.array([0.3, 0.59, 0.11], np.float32) > 0.5
    return np.where(bright[:, None], 0.48 * colour, 0.42 * colour + 0.58)


def _centres(scenes: Sequence[Scene], slot: int, draws: Array) -> tuple[Array, Array]:
    """Centre coordinates: one object near the middle, two either side of it."""
    side = 2 * slot - 1
    x, y = np.empty((2, len(scenes)), np.float32)
    for i, (scene, draw) in enumerate(zip(scenes, draws, strict=True)):
        if scene.relation is None:
            x[i], y[i] = 0.26 * draw[0], 0.26 * draw[1]
        else:
            along, across = 0.47 * side + 0.05 * draw[0], 0.16 * draw[1]
            x[i], y[i] = (along, across) if scene.relation == "left of" else (across, along)
    return x, y


def _texture(things: Sequence[Thing], phase: Array, turn: Array, x: Array, y: Array) -> Array:
    """How much of the second shade each sample has, in [0, 1]; 0 for a plain thing."""
    kind = np.array([TEXTURES.index(t.texture) for t in things])[:, None, None]
    angle = np.where(kind == 1, np.pi / 4 + 0.25 * turn, 0.25 * turn)
    cos, sin = np.cos(angle) / PERIOD, np.sin(angle) / PERIOD
    u = cos * x + sin * y + 0.5 * phase
    v = cos * y - sin * x + 0.5 * turn
    soft = PERIOD * GRID / 2  # one sample wide edges
    du, dv = np.abs(u - np.rint(u)), np.abs(v - np.rint(v))  # 0 at a centre, 0.5 between two
    stripes = np.clip(0.5 + (0.25 - du) * soft, 0, 1)
    dots = np.clip(0.5 + (0.29 - np.hypot(du, dv)) * soft, 0, 1)
    return np.where(kind == 1, stripes, np.where(kind == 2, dots, 0)).astype(np.float32)
