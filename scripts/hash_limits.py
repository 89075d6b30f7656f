"""How far copies of a picture are from it, and other pictures from each other: what the limits of `audit` rest on.

python scripts/hash_limits.py FOLDER_OF_PICTURES
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from rlfseg import images
from rlfseg.audit import Looks, look, similarities


def stored(image: Image.Image, form: str, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, form, quality=quality)
    return Image.open(stream).convert("RGB")


def cropped(share: float) -> Callable[[Image.Image], Image.Image]:
    return lambda i: ImageOps.crop(i, (*[round(s * share) for s in i.size], *[round(s * share) for s in i.size]))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG of quality 30": lambda i: stored(i, "JPEG", 30),
    "WebP of quality 20": lambda i: stored(i, "WEBP", 20),
    "half the size, JPEG of quality 60": lambda i: stored(i.resize((i.width // 2, i.height // 2)), "JPEG", 60),
    "stretched to 256 x 256": lambda i: i.resize((256, 256)),
    "grey": lambda i: i.convert("L").convert("RGB"),
    "brighter by 30 %": lambda i: ImageEnhance.Brightness(i).enhance(1.3),
    "cropped by 1 % on each side": cropped(0.01),
    "cropped by 2.5 % on each side": cropped(0.025),
    "cropped by 5 % on each side": cropped(0.05),
    "mirrored": ImageOps.mirror,
}


def looks(pictures: list[Image.Image]) -> Looks:
    hashes, thumbnails = zip(*(look(np.asarray(p)) for p in pictures), strict=True)
    return Looks(
        ids=[""] * len(pictures),
        coco_ids=[None] * len(pictures),
        hashes=np.array(hashes, np.uint64),
        thumbnails=np.stack([np.frombuffer(t, np.uint8) for t in thumbnails]),
    )


def show(name: str, bits: NDArray[np.uint8], alike: NDArray[np.float32]) -> None:
    found = np.mean((bits <= 10) & (alike >= 0.9))
    low, high = np.percentile(bits, [5, 95])
    print(f"| {name} | {low:.0f} to {high:.0f} | {alike.min():.3f} to {alike.max():.3f} | {found:.1%} |")


def main() -> None:
    pictures = [Image.fromarray(images.load_image(p, name=str(p))) for p in images.list_images(sys.argv[1])]
    originals = looks(pictures)
    print(f"{len(pictures)} pictures\n")
    print("| copy | bits apart, 5 % to 95 % | correlation | found at 10 bits, 0.9 |\n|---|---|---|---|")
    for name, change in COPIES.items():
        copies = looks([change(p) for p in pictures])
        show(
            name,
            np.bitwise_count(originals.hashes ^ copies.hashes),
            similarities(originals.thumbnails, copies.thumbnails).diagonal(),
        )
    pairs = np.triu_indices(len(pictures), 1)
    bits = np.bitwise_count(originals.hashes[:, None] ^ originals.hashes[None])[pairs]
    show("another picture", bits, similarities(originals.thumbnails, originals.thumbnails)[pairs])


if __name__ == "__main__":
    main()
