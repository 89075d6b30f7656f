"""The drawn world: scenes of coloured shapes with phrases, exact masks and polygon-like coarse labels.

A scene is a pure function of `(seed, split, index)`, so splits never share a scene and anyone can redraw them. Three to
one hundred thousand scenes cost a few milliseconds each; nothing is downloaded. The coarse labels fail in the way of
polygon annotations (the paper's Appendix A.1): few corners, jittered, holes filled and thin parts cut, so that SAM
refinement and dynamic selection have something to win.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Split = Literal["train", "val", "test", "tiny"]
Mask = NDArray[np.uint8]

# The world's own weights were trained on "tiny"; the other three splits were never seen by any of them.
SPLITS: dict[str, int] = {"train": 0, "val": 1, "test": 2, "tiny": 3}
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 44),
    "green": (52, 168, 72),
    "blue": (48, 92, 214),
    "yellow": (238, 206, 52),
    "purple": (148, 64, 186),
    "white": (240, 240, 236),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross", "star")
TEXTURES = ("plain", "striped", "dotted")
RADII: dict[str, tuple[float, float]] = {"small": (0.135, 0.16), "large": (0.2, 0.26)}  # of the image's side
PLACES = ("on the left", "on the right", "at the top", "at the bottom")
SUPERSAMPLE = 3  # each pixel's cover is the mean of 3 x 3 points; the exact mask is cover >= 1/2


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One drawn object; lengths and positions are fractions of the image's side, the angle is in radians."""

    kind: str
    colour: str
    texture: str
    size: str
    radius: float
    x: float
    y: float
    angle: float

    def words(self, place: str = "") -> str:
        """The object in full, e.g. `large striped red ring on the left`."""
        texture = "" if self.texture == "plain" else f"{self.texture} "
        return f"{self.size} {texture}{self.colour} {self.kind} {place}".strip()


@dataclass(frozen=True, kw_only=True)
class Phrase:
    """One phrase of a scene and what it means there.

    Attributes:
        caption: The phrase.
        mask: Exact mask, uint8 {0, 1} [H, W].
        instances: Exact mask of each object meant, uint8 {0, 1} [n, H, W]; their OR is `mask`.
        coarse_instances: Polygon-like label of each object, uint8 {0, 1} [n, H, W].
    """

    caption: str
    mask: Mask
    instances: Mask
    coarse_instances: Mask

    @property
    def coarse(self) -> Mask:
        """The polygon-like label of the whole phrase, uint8 {0, 1} [H, W]."""
        union: Mask = self.coarse_instances.max(axis=0)
        return union


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A drawn picture, uint8 RGB [H, W, 3], its full description, its phrases and its visible objects."""

    image: NDArray[np.uint8]
    text: str
    phrases: tuple[Phrase, ...]
    objects: tuple[Shape, ...]


def draw_scene(index: int, *, split: Split = "train", seed: int = 42, size: int = 64, n_phrases: int = 3) -> Scene:
    """Draws scene `index` of a split.

    Args:
        index: Number of the scene, 0 or more.
        split: Scenes of different splits are independent.
        seed: Seed of the world.
        size: Side of the square picture in pixels.
        n_phrases: Phrases at most; fewer where a scene has fewer distinct ones.

    Returns:
        The picture with its phrases, exact and coarse masks.
    """
    rng = np.random.default_rng([seed, SPLITS[split], index])
    objects = _place_objects(rng)
    image, visible = _render(rng, objects, size)
    kept = [(o, m) for o, m in zip(objects, visible, strict=True) if m.sum() >= 12]
    objects = [o for o, _ in kept]
    coarse = [coarsen(m, rng) for _, m in kept]
    phrases = []
    for caption, members in _captions(rng, objects)[:n_phrases]:
        instances = np.stack([kept[i][1] for i in members])
        phrases.append(
            Phrase(
                caption=caption,
                mask=instances.max(axis=0),
                instances=instances,
                coarse_instances=np.stack([coarse[i] for i in members]),
            )
        )
    text = " and ".join(o.words(_place(o)) for o in objects)
    return Scene(image=image, text=text, phrases=tuple(phrases), objects=tuple(objects))


def coarsen(mask: Mask, rng: np.random.Generator, jitter: float = 0.14) -> Mask:
    """A polygon-like label: 5 to 8 corners around the mask's centre, each the farthest pixel of its sector, jittered.

    Args:
        mask: uint8 {0, 1} [H, W], not empty.
        rng: Source of corners and jitter.
        jitter: Standard deviation of a corner's distance from the centre, as a fraction of it.

    Returns:
        uint8 {0, 1} [H, W]; holes are filled and thin parts lost.
    """
    ys, xs = np.nonzero(mask)
    cy, cx = ys.mean(), xs.mean()
    corners = int(rng.integers(5, 9))
    offset = rng.uniform(0, 2 * np.pi)
    angle = (np.arctan2(ys - cy, xs - cx) - offset) % (2 * np.pi)
    sector = (angle / (2 * np.pi) * corners).astype(int)
    polygon = []
    for k in range(corners):
        (inside,) = np.nonzero(sector == k)
        if inside.size:
            far = inside[np.argmax(np.hypot(ys[inside] - cy, xs[inside] - cx))]
            scale = 1 + jitter * rng.standard_normal()
            polygon.append((cx + (xs[far] - cx) * scale, cy + (ys[far] - cy) * scale))
    if len(polygon) < 3:
        return mask.copy()
    canvas = Image.new("L", (mask.shape[1], mask.shape[0]))
    ImageDraw.Draw(canvas).polygon(polygon, fill=1, outline=1)
    return np.asarray(canvas, dtype=np.uint8)


def _place_objects(rng: np.random.Generator) -> list[Shape]:
    objects: list[Shape] = []
    count = int(rng.integers(2, 5))
    for _ in range(60):
        if len(objects) == count:
            break
        size = str(rng.choice(["small", "large"]))
        radius = float(rng.uniform(*RADII[size]))
        x, y = rng.uniform(radius * 0.9, 1 - radius * 0.9, size=2)
        # Neighbours may touch and hide a little of each other, never most of it.
        if any(np.hypot(x - o.x, y - o.y) < 0.85 * (radius + o.radius) for o in objects):
            continue
        twin = objects[0] if objects and rng.random() < 0.25 else None
        objects.append(
            Shape(
                kind=twin.kind if twin else str(rng.choice(SHAPES)),
                colour=twin.colour if twin else str(rng.choice(list(COLOURS))),
                texture=str(rng.choice(TEXTURES, p=[0.5, 0.25, 0.25])),
                size=size,
                radius=radius,
                x=float(x),
                y=float(y),
                angle=float(rng.uniform(0, 2 * np.pi)),
            )
        )
    return objects


def _render(rng: np.random.Generator, objects: list[Shape], size: int) -> tuple[NDArray[np.uint8], list[Mask]]:
    image = _background(rng, size)
    visible: list[Mask] = []
    for o in objects:
        cover = _inside(o, size).reshape(size, SUPERSAMPLE, size, SUPERSAMPLE).mean(axis=(1, 3))
        paint = _paint(rng, o, size)
        image = image * (1 - cover[..., None]) + paint * cover[..., None]
        mask = (cover >= 0.5).astype(np.uint8)
        visible = [m * (1 - mask) for m in visible]
        visible.append(mask)
    image = image + rng.normal(0, 3.0, size=image.shape)
    return np.clip(image, 0, 255).round().astype(np.uint8), visible


def _background(rng: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Muted ground with a slope of light and faint waves, never as bright as white or as vivid as a colour."""
    y, x = np.mgrid[0:size, 0:size] / size
    base = rng.uniform(50, 165) + rng.uniform(-22, 22, size=3)
    slope = rng.uniform(-35, 35) * (x - 0.5) + rng.uniform(-35, 35) * (y - 0.5)
    fx, fy = rng.uniform(-4, 4, size=2)
    waves = rng.uniform(0, 9) * np.sin(2 * np.pi * (fx * x + fy * y) + rng.uniform(0, 6.3))
    ground: NDArray[np.float64] = base + (slope + waves)[..., None]
    return ground


def _paint(rng: np.random.Generator, o: Shape, size: int) -> NDArray[np.float64]:
    """Colour and texture of an object over the whole picture, float64 [H, W, 3]."""
    colour = np.array(COLOURS[o.colour], dtype=np.float64) + rng.normal(0, 9, size=3)
    y, x = np.mgrid[0:size, 0:size].astype(np.float64)
    u, v = x * np.cos(o.angle) + y * np.sin(o.angle), y * np.cos(o.angle) - x * np.sin(o.angle)
    if o.texture == "striped":
        dark = np.sin(2 * np.pi * u / 5.5) > 0.1
    elif o.texture == "dotted":
        dark = (np.sin(2 * np.pi * u / 6) > 0.15) & (np.sin(2 * np.pi * v / 6) > 0.15)
    else:
        dark = np.zeros((size, size), dtype=bool)
    return np.where(dark[..., None], 0.5 * colour, colour)


def _inside(o: Shape, size: int) -> NDArray[np.bool_]:
    """Which points of the supersampled grid lie in the object, bool [3 H, 3 W]."""
    grid = (np.arange(size * SUPERSAMPLE) + 0.5) / (size * SUPERSAMPLE)
    dx, dy = grid[None, :] - o.x, grid[:, None] - o.y
    x = (dx * np.cos(o.angle) + dy * np.sin(o.angle)) / o.radius
    y = (dy * np.cos(o.angle) - dx * np.sin(o.angle)) / o.radius
    r: NDArray[np.float64] = np.hypot(x, y)
    near: NDArray[np.float64] = np.minimum(abs(x), abs(y))
    far: NDArray[np.float64] = np.maximum(abs(x), abs(y))
    if o.kind == "circle":
        return r <= 1
    if o.kind == "square":
        return far <= 0.82
    if o.kind == "ring":
        return (r <= 1) & (r >= 0.52)
    if o.kind == "cross":
        return (near <= 0.3) & (far <= 1)
    # A regular polygon or star: the boundary's radius in the sector between an outer corner and the next inner point.
    corners, inner = {"triangle": (3, 0.5), "star": (5, 0.45)}[o.kind]
    half = np.pi / corners
    phi = half - abs(np.arctan2(y, x) % (2 * half) - half)
    edge = inner * np.sin(half) / (inner * np.sin(half - phi) + np.sin(phi))
    inside: NDArray[np.bool_] = r <= edge
    return inside


def _place(o: Shape) -> str:
    """The place of an object that lies clear of the middle, else nothing."""
    dx, dy = o.x - 0.5, o.y - 0.5
    if max(abs(dx), abs(dy)) < 0.12:
        return ""
    if abs(dx) >= abs(dy):
        return PLACES[0] if dx < 0 else PLACES[1]
    return PLACES[2] if dy < 0 else PLACES[3]


def _captions(rng: np.random.Generator, objects: list[Shape]) -> list[tuple[str, list[int]]]:
    """Phrases that are true of the scene, each with the objects that it means, in random order."""
    found: dict[str, list[int]] = {}
    for o in objects:
        name = f"{o.colour} {o.kind}"
        same = [i for i, other in enumerate(objects) if f"{other.colour} {other.kind}" == name]
        forms = [(name, same), (f"{o.size} {name}", [i for i in same if objects[i].size == o.size])]
        if o.texture != "plain":
            forms.append((f"{o.texture} {o.kind}", _where(objects, kind=o.kind, texture=o.texture)))
        forms.append((o.kind, _where(objects, kind=o.kind)))
        places = {_place(objects[i]) for i in same}
        if "" not in places:
            forms.append((f"{name} {_place(o)}", [i for i in same if _place(objects[i]) == _place(o)]))
        # The plain form twice as often as each of the others: it is what people type.
        caption, members = forms[int(rng.integers(-1, len(forms)))] if rng.random() > 0.25 else forms[0]
        found.setdefault(caption, members)
        found.setdefault(name, same)
    order = list(found.items())
    rng.shuffle(order)
    return order


def _where(objects: list[Shape], **wanted: str) -> list[int]:
    return [i for i, o in enumerate(objects) if all(getattr(o, k) == v for k, v in wanted.items())]
