"""Worlds of pictures, a format each."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutate
import numpy as np
from PIL import Image
from world import HEIGHT, WIDTH, World

from rlfseg import images
from rlfseg.errors import DataError


def picture(mode: str = "RGB") -> Image.Image:
    shape = (HEIGHT, WIDTH) if mode in ("L", "1") else (HEIGHT, WIDTH, len(mode))
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(noise > 127 if mode == "1" else noise)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def pictures(form: str, variants: dict[str, bytes]) -> World:
    """Files of one format, read as picture, mask, label map and size."""

    def read(folder: Path) -> None:
        for load in (images.load_mask, images.load_labels):
            with contextlib.suppress(DataError):
                load(folder / "input", name="input", max_pixels=1_000_000)  # type: ignore[operator]
        images.load_image(folder / "input", name="input", max_pixels=1_000_000)

    mutation = mutate.of_png if form == "PNG" else mutate.of_bytes

    def any_of(rng: random.Random, _: bytes) -> bytes:
        return mutation(rng, variants[rng.choice(sorted(variants))])

    return World(files={"input": next(iter(variants.values()))}, mutations={"input": any_of}, read=read)


def formats() -> dict[str, Callable[[], World]]:
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb, grey, alpha = picture(), picture("L"), picture("RGBA")
    wide = Image.fromarray(np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 400)
    many = {"save_all": True, "append_images": [grey.convert("RGB"), rgb]}
    variants: dict[str, dict[str, Callable[[], bytes]]] = {
        "PNG": {
            "rgb": lambda: encoded(rgb, "PNG", exif=exif.tobytes()),
            "palette": lambda: encoded(rgb.quantize(7), "PNG", transparency=2),
            "16": lambda: encoded(wide, "PNG"),
            "1": lambda: encoded(picture("1"), "PNG"),
            "alpha": lambda: encoded(alpha, "PNG", pnginfo=None),
            "animated": lambda: encoded(rgb, "PNG", **many),
        },
        "JPEG": {
            "rgb": lambda: encoded(rgb, "JPEG", exif=exif.tobytes()),
            "grey": lambda: encoded(grey, "JPEG", progressive=True),
            "cmyk": lambda: encoded(rgb.convert("CMYK"), "JPEG"),
        },
        "WEBP": {
            "lossy": lambda: encoded(alpha, "WEBP", exif=exif.tobytes()),
            "lossless": lambda: encoded(rgb, "WEBP", lossless=True),
            "animated": lambda: encoded(rgb, "WEBP", **many),
        },
        "TIFF": {
            "raw": lambda: encoded(rgb, "TIFF"),
            "lzw": lambda: encoded(rgb, "TIFF", compression="tiff_lzw"),
            "deflate": lambda: encoded(rgb, "TIFF", compression="tiff_adobe_deflate"),
            "jpeg": lambda: encoded(rgb, "TIFF", compression="jpeg"),
            "g4": lambda: encoded(picture("1"), "TIFF", compression="group4"),
            "16": lambda: encoded(wide, "TIFF"),
            "pages": lambda: encoded(rgb, "TIFF", **many),
        },
        "GIF": {"one": lambda: encoded(rgb, "GIF"), "animated": lambda: encoded(rgb, "GIF", **many)},
        "BMP": {"rgb": lambda: encoded(rgb, "BMP"), "palette": lambda: encoded(rgb.quantize(5), "BMP")},
        "PPM": {"rgb": lambda: encoded(rgb, "PPM"), "16": lambda: encoded(wide, "PPM")},
        "AVIF": {"rgb": lambda: encoded(rgb, "AVIF")},
        "JPEG2000": {"rgb": lambda: encoded(rgb, "JPEG2000")},
    }  # fmt: skip
    return {
        form.lower(): lambda form=form, made=made: pictures(form, {k: make() for k, make in made.items()})  # type: ignore[misc]
        for form, made in variants.items()
    }
