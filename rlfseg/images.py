"""Pictures and masks: decoding with limits, and every change of frame between files, arrays and the network's square.

Frames: a *picture* is uint8 RGB [H, W, 3] as people see it (EXIF rotation applied); a *mask* is uint8 {0, 1} [H, W] in
the picture's frame; the *square* is the network's R x R, to which both are stretched without padding (the paper's 512).
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EINVAL, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pycocotools.mask as coco
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from rlfseg.errors import BadSample, DataError

if TYPE_CHECKING:
    from torch import Tensor  # imported where it is used: decoding workers never need torch

Source = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image

MAX_PIXELS = 64_000_000
MOST_PIXELS = 2 * 89_478_485  # that Pillow opens, and so the highest limit that one may set
BAND = 2**22  # pixels of a picture that are floats at a time
TALL = 2**16  # rows; no JPEG has more
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2"}
)
# Only plain raster formats. Pillow would also hand EPS to Ghostscript, which runs programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# What Pillow's decoders raise on damaged bytes; it has no error class of its own for that.
WRONG = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, OverflowError, RuntimeError)
DAMAGED = (*WRONG, MemoryError, AssertionError, struct.error, zlib.error)
# Numbers of a file's own errors: none where Pillow raises it, EINVAL where damaged bytes make it seek to nowhere.
OF_ITS_NAME = (ENOENT, EACCES, EISDIR, ENOTDIR, ENAMETOOLONG)
OF_THE_FILE = (None, *OF_ITS_NAME, ELOOP, EINVAL)
BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def load_image(
    source: Source, *, name: str, sample: str | None = None, max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes a picture as people see it, whatever its file is called.

    EXIF rotation is applied; transparency is laid on white; 16-bit grey is scaled to 8 bit; CMYK and YCCK become RGB;
    of an animation the first frame is taken.

    Args:
        source: A path, the file's bytes, a file open for reading bytes, or a picture that Pillow has opened.
        name: What errors call it.
        sample: Its id, for errors.
        max_pixels: Largest height times width; checked before anything is decoded.

    Returns:
        uint8 RGB [H, W, 3], contiguous.

    Raises:
        BadSample: Not a picture, truncated, damaged, too large, or of a bit depth that has no defined range.
        DataError: Its disk or mount fails, which says nothing about the picture.
    """
    with opened(source, name=name, sample=sample, max_pixels=max_pixels) as image:
        return np.array(_on_white(image), dtype=np.uint8)


def load_mask(
    source: Source, *, name: str, sample: str | None = None, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Decodes a mask: 0/1 or 0/255, 1-bit, grey, palette or grey stored as RGB.

    A palette whose colours are all black or white is read by colour, any other by index.

    Args:
        source: A path, the file's bytes, a file open for reading bytes, or a picture that Pillow has opened.
        name: What errors call it.
        sample: Its id, for errors.
        max_pixels: Largest height times width; checked before anything is decoded.

    Returns:
        uint8 {0, 1} [H, W].

    Raises:
        BadSample: As `load_image`, or other values than those, or colours, or transparency.
    """
    with opened(source, name=name, sample=sample, max_pixels=max_pixels) as image:
        values = _mask_values(image)
    return to_binary(values, file=name, sample=sample)


def load_labels(
    source: Source, *, name: str, sample: str | None = None, max_pixels: int = MAX_PIXELS
) -> NDArray[np.int32]:
    """Decodes a label map: the numbers that its file holds; of a palette the index, of a colour R + 256 G + 65536 B.

    Args:
        source: A path, the file's bytes, a file open for reading bytes, or a picture that Pillow has opened.
        name: What errors call it.
        sample: Its id, for errors.
        max_pixels: Largest height times width; checked before anything is decoded.

    Returns:
        int32 [H, W].

    Raises:
        BadSample: As `load_image`, or transparency, or numbers that aren't whole.
    """
    with opened(source, name=name, sample=sample, max_pixels=max_pixels) as image:
        values = np.asarray(image)
    if values.ndim == 3 and values.shape[2] == 3:
        return values.astype(np.int32) @ np.array([1, 256, 65536], np.int32)
    if values.ndim != 2 or values.dtype.kind not in "biu":
        reason = f"a label map holds whole numbers or RGB, this is {values.dtype} of shape {values.shape}"
        raise BadSample(reason, file=name, sample=sample)
    return values.astype(np.int32)


@contextmanager
def opened(
    source: Source, *, name: str, sample: str | None = None, max_pixels: int = MAX_PIXELS
) -> Iterator[Image.Image]:
    """A picture as Pillow has it, EXIF rotation applied; raises as `load_image`, also for what the block meets."""
    try:
        with _open(source, max_pixels) as image:
            ImageOps.exif_transpose(image, in_place=True)
            yield image
    except (*DAMAGED, *BOMB) as error:
        raise _unusable(error, name, sample) from error


def to_binary(array: NDArray[Any], *, file: str, sample: str | None = None) -> NDArray[np.uint8]:
    """A mask in any of the usual codings as {0, 1}: bool, or numbers 0/1 or 0/255; nothing else is guessed at.

    Args:
        array: [H, W], bool, integer or float.
        file: Its file, for errors.
        sample: Its id, for errors.

    Returns:
        uint8 {0, 1} [H, W]; the array itself where it is that already.

    Raises:
        BadSample: Other values, rank or type, or no pixels.
    """
    if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "biuf":
        found = f"{array.dtype} of shape {array.shape}"
        raise BadSample(f"a mask must be numbers [height, width], this is {found}", file=file, sample=sample)
    top = array.max()
    if array.dtype == np.uint8 and top <= 1:  # the common case
        return array
    inside: NDArray[np.bool_] = array != 0
    if top not in (0, 1, 255) or not np.array_equal(inside, array == (top or 1)):
        some = ", ".join(str(v) for v in np.unique(array)[:5])
        reason = f"a mask must hold only 0 and 1, or only 0 and 255; this one holds {some} ..."
        raise BadSample(reason, file=file, sample=sample)
    return inside.astype(np.uint8)


def image_to_tensor(image: UInt8[np.ndarray, "H W 3"], resolution: int) -> Float[Tensor, "3 R R"]:
    """A picture, uint8 RGB [H, W, 3], stretched to the network's square: float32 [3, R, R] in [-1, 1]."""
    import torch

    if len(image) > TALL:  # torch goes along the rows first: to R pixels each, so many would fill the memory
        return image_to_tensor(image.transpose(1, 0, 2), resolution).transpose(1, 2).contiguous()
    rows, wide = max(1, BAND // image.shape[1]), []
    for y in range(0, len(image), rows):
        # a copy: torch takes no arrays with steps backwards, and warns of those that are read-only, as Pillow's are
        band = torch.from_numpy(np.array(image[y : y + rows], order="C")).permute(2, 0, 1).float()
        wide.append(_stretch(band, (band.shape[1], resolution)))
    return _stretch(torch.cat(wide, dim=1), (resolution, resolution)) / 127.5 - 1


def mask_to_tensor(mask: UInt8[np.ndarray, "H W"], resolution: int) -> Float[Tensor, "3 R R"]:
    """A mask in the network's frame: a pixel is mask where at least half of its area is; three equal channels.

    Args:
        mask: uint8 {0, 1} [H, W].
        resolution: R, in pixels.

    Returns:
        float32 [3, R, R], exactly -1 and 1.
    """
    import torch

    cover = Image.fromarray(mask.astype(np.float32)).resize((resolution, resolution), Image.Resampling.BOX)
    inside = torch.from_numpy(np.asarray(cover) >= 0.5)
    return (inside.float() * 2 - 1).expand(3, -1, -1).clone()


def tensor_to_score(decoded: Float[Tensor, "*batch 3 R R"], size: tuple[int, int]) -> Float[Tensor, "*batch H W"]:
    """A decoded mask as scores in the picture's frame: mean of the channels, clamped, resized bilinearly.

    Args:
        decoded: [..., 3, R, R], mask in [-1, 1], of any float type and on any device.
        size: (H, W) of the picture.

    Returns:
        float32 [..., H, W] in [0, 1]; NaN stays NaN.
    """
    return square_to_score(tensor_to_square(decoded), size)


def tensor_to_square(decoded: Float[Tensor, "*batch 3 R R"]) -> Float[Tensor, "*batch R R"]:
    """A decoded mask in [-1, 1] as scores in the network's frame: float32 [..., R, R] in [0, 1]; NaN stays NaN."""
    return (decoded.float().mean(dim=-3).clamp(-1, 1) + 1) / 2


def square_to_score(square: Float[Tensor, "*batch R R"], size: tuple[int, int]) -> Float[Tensor, "*batch H W"]:
    """Scores in the network's frame brought to the picture's size (H, W), bilinearly; float32 [..., H, W] in [0, 1]."""
    planes = square.reshape(-1, *square.shape[-2:])
    return _stretch(planes, size).clamp(0, 1).reshape(*square.shape[:-2], *size)


def rle_encode(mask: UInt8[np.ndarray, "H W"]) -> str:
    """A mask, uint8 {0, 1} [H, W], as the compressed counts of COCO's run-length encoding."""
    counts: bytes = coco.encode(np.asfortranarray(mask))["counts"]
    return counts.decode("ascii")


def rle_decode(counts: str | bytes | list[Any], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The mask of COCO's counts, compressed or not.

    Args:
        counts: As `rle_encode` gives them, or as a list of whole numbers: off, on, off ... down the columns.
        size: (H, W).

    Returns:
        uint8 {0, 1} [H, W].

    Raises:
        DataError: Not such counts, or of another size.
    """
    height, width = size
    if not 0 < height * width <= MOST_PIXELS or min(size) < 1:
        raise DataError(f"a mask of {height} x {width} pixels is outside 1 to {MOST_PIXELS:,}")
    # Not by pycocotools: its decoder writes outside its buffer where the counts are damaged.
    runs = _plain_runs(counts) if isinstance(counts, list) else _runs(counts)
    if runs is None or not 0 <= runs.min() <= runs.max() <= height * width or runs.sum() != height * width:
        raise DataError(f"RLE counts {counts[:40]!a} don't describe a mask of {height} x {width} pixels")
    column_major: NDArray[np.uint8] = np.repeat((np.arange(runs.size) % 2).astype(np.uint8), runs)
    return np.ascontiguousarray(column_major.reshape(width, height).T)


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """The pictures directly in a folder by suffix in any case, sorted by name; hidden files are left out.

    Args:
        folder: The folder.

    Returns:
        Paths that begin with `folder`.

    Raises:
        DataError: No such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: not a folder")
    return sorted(
        p for p in root.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()
    )


def _open(source: Source, max_pixels: int) -> Image.Image:
    """Reads the header and refuses too many pixels; the caller decodes and closes."""
    if isinstance(source, Image.Image):
        image = source.copy()  # the caller's own stays open, and as it was
    else:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise Image.DecompressionBombError(f"{width} x {height} pixels are more than the limit of {max_pixels:,}")
    return image


def _unusable(error: BaseException, name: str, sample: str | None = None) -> DataError:
    if isinstance(error, OSError) and error.errno not in OF_THE_FILE:
        return DataError(f"{name} can't be read: {error.strerror}; start again, it goes on from here")
    return BadSample(_reason(error), file=name, sample=sample)


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):
        return f"not a picture in one of the formats {', '.join(FORMATS)}"
    if isinstance(error, BOMB):
        return f"too many pixels: {error}"
    return f"can't be decoded: {str(error) or type(error).__name__}"


def _on_white(image: Image.Image) -> Image.Image:
    """Any mode as RGB, with transparency laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        return _grey16(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _grey16(image: Image.Image) -> Image.Image:
    """16-bit grey, 0 to 65535, as 8-bit grey; Pillow's own conversion clips at 255 instead of scaling."""
    # Pillow opens a 16-bit PGM as "I" after scaling it to 0..65535; any other "I" or "F" has no defined range.
    if not (image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")):
        raise ValueError(f"unsupported bit depth (mode {image.mode}): save it with 8 or 16 bits a channel")
    wide = np.asarray(image).astype(np.uint32)
    grey = (wide + 128) // 257
    transparent = image.info.get("transparency")
    return Image.fromarray(np.where(wide == transparent, 255, grey).astype(np.uint8))


def _mask_values(image: Image.Image) -> NDArray[Any]:
    """The numbers that a mask's file holds, [H, W]."""
    if image.mode == "P" and {c for _, c in image.convert("RGB").getcolors(256) or ()} <= {(0,) * 3, (255,) * 3}:
        image = image.convert("L")
    if image.mode in ("RGBA", "LA"):
        if image.getchannel("A").getextrema() != (255, 255):
            raise ValueError("a mask must not be transparent anywhere")
        image = image.convert(image.mode[:-1])
    values = np.asarray(image)
    if image.mode != "RGB":
        return values
    if (values != values[..., :1]).any():
        raise ValueError("a mask must be grey, this one has colours")
    return values[..., 0]


def _stretch(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with antialiasing, [C, H, W] -> [C, *size]."""
    from torch.nn.functional import interpolate

    return interpolate(planes[None], size=size, mode="bilinear", antialias=True)[0]


def _plain_runs(counts: list[Any]) -> NDArray[np.int64] | None:
    """Run lengths that are written out, or None if they are none."""
    if not counts or not all(type(run) is int and 0 <= run <= MOST_PIXELS for run in counts):
        return None
    return np.array(counts, np.int64)


def _runs(counts: str | bytes) -> NDArray[np.int64] | None:
    """Run lengths of COCO's compressed counts, or None if they can't be read.

    Each number is little-endian in digits of 5 bits from chr(48) on; bit 5 says that another digit follows, bit 4 of
    the last is the sign; from the fourth number on, each is the difference from the one two before.
    """
    text = counts.encode("utf-8", "replace") if isinstance(counts, str) else counts
    digits = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if digits.size == 0 or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        return None
    last = digits & 32 == 0
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(digits.size) - np.repeat(starts, ends - starts + 1)
    if place.max() > 6:  # 35 bits: no mask has longer runs, and int64 can't overflow
        return None
    runs = np.add.reduceat((digits & 31) << (5 * place), starts)
    runs -= np.where(digits[ends] & 16, 1 << (5 * (place[ends] + 1)), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs
