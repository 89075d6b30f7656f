"""Pictures for people: masks over images, contact sheets, curves.

Everything returns arrays or writes one PNG; no window, no global matplotlib state. Pictures are uint8 RGB [H, W, 3],
masks uint8 {0, 1} [H, W] in the frame of their image.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Picture = NDArray[np.uint8]
Mask = NDArray[np.uint8]
Colour = tuple[int, int, int]

# Told apart by most people who see few colours, and unlike skin, grass or sky.
PALETTE: tuple[Colour, ...] = (
    (230, 25, 120),
    (0, 158, 240),
    (255, 176, 0),
    (20, 190, 120),
    (150, 80, 240),
    (255, 95, 30),
    (0, 205, 205),
    (190, 215, 0),
    (35, 60, 170),
    (150, 75, 20),
    (255, 175, 205),
    (0, 95, 60),
    (125, 0, 40),
    (175, 165, 255),
    (105, 105, 0),
    (85, 85, 95),
)
PAPER: Colour = (255, 255, 255)
INK: Colour = (32, 32, 36)
FAINT: Colour = (120, 120, 128)
OPACITY = 0.42  # of a mask's colour, inside
MIN_SIDE = 384  # pixels of the picture's width below which it is enlarged
MAX_HEIGHT = 2048  # to which a picture is enlarged at most
FONT_SIZE = 15
GAP = 10
LEVELS = np.tile(np.arange(256.0), (3, 1))  # of red, green and blue
BAND = 9  # pixels, along x, of the bands in which overlapping masks alternate


def colour(i: int) -> Colour:
    """The colour of the i-th phrase; beyond the palette, hues a golden angle apart."""
    if i < len(PALETTE):
        return PALETTE[i]
    r, g, b = colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.75, 0.85)
    return round(255 * r), round(255 * g), round(255 * b)


def overlay(
    image: Picture,
    masks: Sequence[Mask],
    captions: Sequence[str],
    *,
    notes: Sequence[str] = (),
) -> Picture:
    """Masks over their image, each tinted and outlined in its phrase's colour, above a legend.

    Small images are enlarged by a whole factor, so that outlines lie on the borders of pixels. Holes stay untinted.
    Where masks overlap, or are the same, their colours alternate in diagonal bands, so that none is hidden.

    Args:
        image: uint8 RGB [H, W, 3].
        masks: uint8 {0, 1} [H, W], one a phrase.
        captions: The phrases.
        notes: A remark behind each phrase in the legend, such as a score; empty: none.

    Returns:
        uint8 RGB [H', W', 3]: the enlarged image and the legend below it.
    """
    factor = max(1, min(-(-MIN_SIDE // image.shape[1]), MAX_HEIGHT // image.shape[0]))
    canvas = _enlarge(image, factor)
    inside = [(mask > 0).repeat(factor, axis=0).repeat(factor, axis=1) for mask in masks]
    for i, tint in enumerate(_share_out(inside, BAND)):
        _repaint(canvas, tint, (1 - OPACITY) * LEVELS + OPACITY * np.array(colour(i))[:, None])
    for mask in inside:
        # A dark line around each object makes its outline stand out from any ground.
        _repaint(canvas, _grown(mask) & ~mask, 0.35 * LEVELS)
    for i, line in enumerate(_share_out([mask & ~_shrunk(mask) for mask in inside], BAND)):
        canvas[line] = colour(i)
    height, width = canvas.shape[:2]
    strip = legend(captions, max(width, MIN_SIDE), notes=notes)
    page = np.full((height + len(strip), strip.shape[1], 3), PAPER, dtype=np.uint8)  # free beside a narrow picture
    page[:height, :width], page[height:] = canvas, strip
    return page


def legend(captions: Sequence[str], width: int, *, notes: Sequence[str] = ()) -> Picture:
    """A strip with each phrase beside a patch of its colour, in as many lines as they need.

    Args:
        captions: The phrases.
        width: Width of the strip in pixels; a phrase that is longer is cut with an ellipsis.
        notes: A remark behind each phrase, in grey; empty: none.

    Returns:
        uint8 RGB [h, width, 3]; h is 0 without phrases.
    """
    font, line, patch = _font(FONT_SIZE), FONT_SIZE + 9, FONT_SIZE - 2
    remarks = [f"  {note}" if note else "" for note in (notes or [""] * len(captions))]
    places: list[tuple[float, int, str, str]] = []
    x, row = float(GAP), 0
    for caption, remark in zip(captions, remarks, strict=True):
        text = _fit(caption, width - 3 * GAP - patch - font.getlength(remark), font)
        length = patch + GAP * 0.7 + font.getlength(text + remark)
        if x > GAP and x + length > width - GAP:
            x, row = float(GAP), row + 1
        places.append((x, row, text, remark))
        x += length + 2 * GAP
    strip = Image.new("RGB", (width, (row + 1) * line + GAP if captions else 0), PAPER)
    pen = ImageDraw.Draw(strip)
    for i, (x, row, text, remark) in enumerate(places):
        middle = GAP // 2 + row * line + line / 2
        box = (x, middle - patch / 2, x + patch, middle + patch / 2)
        pen.rounded_rectangle(box, radius=3, fill=colour(i))
        start = x + patch + GAP * 0.7
        pen.text((start, middle), text, fill=INK, font=font, anchor="lm")
        pen.text((start + font.getlength(text), middle), remark, fill=FAINT, font=font, anchor="lm")
    return np.asarray(strip, dtype=np.uint8)


def contact_sheet(
    rows: Sequence[Sequence[Picture]], *, titles: Sequence[str] = (), notes: Sequence[str] = (), cell: int = MIN_SIDE
) -> Picture:
    """Pictures in a grid on white, such as image, label, refined label and prediction of some samples.

    Args:
        rows: Pictures, uint8 RGB, of any sizes; rows may differ in length.
        titles: A heading for each column; empty: none.
        notes: A line above each row; empty: none.
        cell: Width in pixels to which every picture is scaled.

    Returns:
        uint8 RGB.
    """
    font, head = _font(FONT_SIZE), FONT_SIZE + GAP
    scaled = [[_to_width(picture, cell) for picture in row] for row in rows]
    heights = [max((p.height for p in row), default=0) for row in scaled]
    across = max([len(row) for row in rows] + [len(titles), 1])
    extra = head if notes else 0
    size = (across * (cell + GAP) + GAP, (head if titles else GAP) + sum(heights) + len(rows) * (GAP + extra))
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for j, text in enumerate(titles):
        place = GAP + j * (cell + GAP) + cell / 2
        pen.text((place, head / 2), _fit(text, cell, font), fill=INK, font=font, anchor="mm")
    y = head if titles else GAP
    for i, row in enumerate(scaled):
        if notes:
            pen.text((GAP, y + extra / 2), _fit(notes[i], size[0] - 2 * GAP, font), fill=FAINT, font=font, anchor="lm")
        for j, picture in enumerate(row):
            sheet.paste(picture, (GAP + j * (cell + GAP), y + extra))
        y += heights[i] + GAP + extra
    return np.asarray(sheet, dtype=np.uint8)


def curves(
    path: Path,
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    title: str = "",
    x: str = "step",
    y: str = "",
    marks: Mapping[str, tuple[float, float]] | None = None,
) -> Path:
    """Writes curves as a PNG.

    Args:
        path: PNG file to write.
        series: Name to (x values, y values); values that are not finite leave a gap.
        title: Heading.
        x: Label of the x axis.
        y: Label of the y axis.
        marks: Name of a curve to a point (x, y) that is circled in its colour.

    Returns:
        `path`.
    """
    figure = Figure(figsize=(7.2, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (name, (xs, ys)) in enumerate(series.items()):
        values = np.asarray(ys, dtype=np.float64)
        dots = 3.5 if values.size <= 30 else 0
        shown = np.where(np.isfinite(values), values, np.nan)
        axes.plot(np.asarray(xs), shown, color=_unit(colour(i)), label=name, marker="o", markersize=dots)
    for i, name in enumerate(series):
        if name in (marks or {}):
            axes.plot(
                *(marks or {})[name], marker="o", markersize=9, markerfacecolor="none", markeredgecolor=_unit(colour(i))
            )
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    if len(series) > 1 or marks:
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def iou_by_threshold(path: Path, thresholds: ArrayLike, ious: Mapping[str, ArrayLike]) -> Path:
    """Writes mean IoU against the score's threshold as a PNG, the best point of each curve circled and named.

    Args:
        path: PNG file to write.
        thresholds: [n], in [0, 1].
        ious: Name to mean IoU [n] in [0, 1].

    Returns:
        `path`.
    """
    ts = np.asarray(thresholds, dtype=np.float64)
    series, marks = {}, {}
    for name, values in ious.items():
        line = np.asarray(values, dtype=np.float64)
        best = int(line.argmax())
        label = f"{name}: {line[best]:.3f} at {ts[best]:.2f}"
        series[label], marks[label] = (ts, line), (float(ts[best]), float(line[best]))
    return curves(path, series, title="Mean IoU by threshold", x="threshold of the score", y="mean IoU", marks=marks)


def save(path: Path, picture: Picture) -> Path:
    """Writes a picture, uint8 RGB [H, W, 3], as a PNG, makes the folder if need be, and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    return path


def _enlarge(image: Picture, factor: int) -> Picture:
    height, width = image.shape[:2]
    large = Image.fromarray(image).resize((width * factor, height * factor), Image.Resampling.LANCZOS)
    return np.array(large)


def _repaint(canvas: Picture, where: NDArray[np.bool_], levels: NDArray[np.float64]) -> None:
    """Gives pixels the new level [3, 256] of what they were: as floats, those of a photograph would be a gigabyte."""
    for channel, new in zip(np.moveaxis(canvas, -1, 0), levels.round().astype(np.uint8), strict=True):
        channel[where] = new[channel[where]]


def _share_out(masks: Sequence[NDArray[np.bool_]], band: int) -> Iterator[NDArray[np.bool_]]:
    """Gives each pixel to one of the masks that cover it, in turns along the diagonals. bool [H, W] in and out."""
    if not masks:
        return
    # A mask after the other, in small numbers: a photograph's pixels are many
    height, width = masks[0].shape
    covering = np.zeros((height, width), dtype=np.uint16)
    for mask in masks:
        covering += mask
    y, x = np.ogrid[:height, :width]
    turn = ((x + y).astype(np.int32) // band % np.maximum(covering, 1)).astype(np.uint16)
    rank = np.zeros_like(covering)
    for mask in masks:
        yield mask & (rank == turn)
        rank += mask


def _grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask and one pixel around it."""
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MaxFilter(3))) > 0


def _shrunk(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask without its outer two pixels."""
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MinFilter(5))) > 0


def _to_width(picture: Picture, width: int) -> Image.Image:
    height = max(1, round(picture.shape[0] * width / picture.shape[1]))
    return Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow's built-in font stops at Latin-1; matplotlib ships one that has Greek, Cyrillic and more.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


def _fit(text: str, room: float, font: ImageFont.FreeTypeFont) -> str:
    """The text on one line, cut with an ellipsis where it is wider than `room` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(f"{text}…") > room:
        text = text[:-1]
    return f"{text.rstrip()}…"


def _unit(rgb: Colour) -> tuple[float, float, float]:
    return rgb[0] / 255, rgb[1] / 255, rgb[2] / 255
