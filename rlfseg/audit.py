"""What is in files of samples, and which pictures two sets share; counting and comparing, without Ray.

Shared pictures are found in two steps. A 64-bit perceptual hash (`imagehash.phash`: the signs of a picture's lowest
frequencies) survives another size, format or brightness; pairs within a few bits are candidates. What confirms one is a
second look of another kind: the correlation of two grey 32 x 32 thumbnails. Crops and mirrored copies aren't found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rlfseg import draw
from rlfseg.errors import BadSample
from rlfseg.hdf5 import Sample, Seen

Picture = NDArray[np.uint8]

# --- contents --------------------------------------------------------------------------------------------------------

AREAS = ((0.0, "empty"), (0.001, "to 0.1 %"), (0.01, "to 1 %"), (0.1, "to 10 %"), (0.5, "to 50 %"), (1.0, "over 50 %"))
FREQUENT = 10  # captions named
SHOWN_SIDE, SHOWN_PHRASES, ACROSS = 512, 8, 4  # pixels, phrases and pictures a row on a contact sheet


class Contents:
    """Counts over samples, and everything that is wrong with them.

    Attributes:
        images: Samples read.
        problems: Samples and files that can't be used.
        notes: What is odd and allowed: how often each.
    """

    def __init__(self) -> None:
        self.images, self.coco_ids = 0, 0
        self.problems: list[BadSample] = []
        self.notes: Counter[str] = Counter()
        self._heights, self._widths, self._phrases = Counter[int](), Counter[int](), Counter[int]()
        self._captions, self._areas, self._objects = Counter[str](), Counter[str](), Counter[int]()
        self._file_of: dict[str, str] = {}

    def add(self, found: Seen | BadSample) -> None:
        """Counts one sample, or keeps its problem."""
        if isinstance(found, BadSample):
            self.problems.append(found)
            return
        if found.id in self._file_of:
            reason = f"this id is in {self._file_of[found.id]} too"
            self.problems.append(BadSample(reason, file=found.file, sample=found.id))
        self._file_of[found.id] = found.file
        self.images += 1
        self.coco_ids += found.coco_id is not None
        self._heights[found.size[0]] += 1
        self._widths[found.size[1]] += 1
        self._phrases[len(found.captions)] += 1
        self._captions.update(found.captions)
        self._areas.update(_size_of(area / (found.size[0] * found.size[1])) for area in found.areas)
        self._objects.update(n for n in found.instances if n is not None)
        self.notes += Counter(_odd(found))

    def as_dict(self) -> dict[str, Any]:
        """All counts as plain dicts, ready for JSON."""
        return {
            "images": self.images,
            "phrases": self._captions.total(),
            "height": _spread(self._heights),
            "width": _spread(self._widths),
            "phrases_per_image": _spread(self._phrases),
            "captions": {"distinct": len(self._captions), "longest": max(map(len, self._captions), default=0)},
            "frequent_captions": dict(self._captions.most_common(FREQUENT)),
            "masks_by_share_of_image": {name: self._areas[name] for _, name in AREAS},
            "objects_per_phrase": _spread(self._objects),
            "images_with_coco_id": self.coco_ids,
            "notes": dict(self.notes),
            "problems": list(map(str, self.problems)),
        }


def _size_of(share: float) -> str:
    return next(name for top, name in AREAS if share <= top)


def _odd(found: Seen) -> Iterator[str]:
    if not found.captions:
        yield "images without phrases"
    if len(set(found.captions)) < len(found.captions):
        yield "images that have a phrase twice"
    for caption, area in zip(found.captions, found.areas, strict=True):
        if not caption.strip():
            yield "empty phrases (they can't be asked)"
        if area == found.size[0] * found.size[1]:
            yield "masks that cover the whole image"


def _spread(counts: Counter[int]) -> dict[str, int]:
    """Least, median and most of what was counted."""
    if not counts:
        return {}
    values, half = sorted(counts), (counts.total() + 1) // 2
    below = np.cumsum([counts[v] for v in values])
    return {"min": values[0], "median": values[int(np.searchsorted(below, half))], "max": values[-1]}


def contact_sheet(samples: Sequence[Sample]) -> Picture:
    """Samples with their masks over them, four a row, uint8 RGB; of many phrases the first eight."""
    pictures = [_shown(sample) for sample in samples]
    return draw.contact_sheet([pictures[n : n + ACROSS] for n in range(0, len(pictures), ACROSS)])


def _shown(sample: Sample) -> Picture:
    phrases = sample.phrases[:SHOWN_PHRASES]
    shrink = min(1.0, SHOWN_SIDE / max(sample.image.shape[:2]))
    size = tuple(max(1, round(side * shrink)) for side in sample.image.shape[1::-1])
    image = np.asarray(Image.fromarray(sample.image).resize(size, Image.Resampling.BOX))
    masks = [np.asarray(Image.fromarray(p.mask).resize(size, Image.Resampling.NEAREST)) for p in phrases]
    return draw.overlay(image, masks, [p.caption for p in phrases])


# --- pictures that two sets share ------------------------------------------------------------------------------------

THUMBNAIL = 32  # pixels a side
FLAT = 2.0  # grey levels: a thumbnail that varies less has nothing to compare
BLOCK = 1024  # pictures compared at a time with all of the other set


@dataclass(frozen=True, kw_only=True, eq=False)
class Looks:
    """What n pictures look like.

    Attributes:
        ids: One a picture.
        coco_ids: Ids in COCO; None where unknown.
        hashes: uint64 [n], of `look`.
        thumbnails: uint8 [n, 1024], of `look`.
    """

    ids: Sequence[str]
    coco_ids: Sequence[str | None]
    hashes: NDArray[np.uint64]
    thumbnails: NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A picture of the first set, and the one of the second that is the same.

    Attributes:
        train: Id in the first set.
        test: Id in the second.
        how: `coco_id`, or `picture` where only the pixels tell.
        distance: Bits in which the hashes differ, 0 to 64.
        similarity: Correlation of the thumbnails, -1 to 1.
    """

    train: str
    test: str
    how: str
    distance: int
    similarity: float


def look(image: Picture) -> tuple[int, bytes]:
    """What is compared of a picture.

    Args:
        image: uint8 RGB [H, W, 3].

    Returns:
        Its perceptual hash of 64 bits, and a grey thumbnail of 32 x 32 bytes.
    """
    grey = Image.fromarray(image).convert("L")
    bits = np.packbits(imagehash.phash(grey).hash)
    thumbnail = grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return int.from_bytes(bits.tobytes(), "big"), thumbnail.tobytes()


def shared(train: Looks, test: Looks, *, distance: int, similarity: float) -> list[Pair]:
    """Every picture of the first set that is in the second too, each with its best match there.

    Args:
        train: The first set.
        test: The second set.
        distance: Most bits in which hashes of the same picture differ.
        similarity: Least correlation of thumbnails of the same picture.

    Returns:
        At most one pair a picture of `train`, in its order.
    """
    by_coco = {coco_id: n for n, coco_id in enumerate(test.coco_ids) if coco_id is not None}
    known = {n: by_coco[c] for n, c in enumerate(train.coco_ids) if c is not None and c in by_coco}
    theirs, pairs = _standardised(test.thumbnails), []
    for start in range(0, len(train.ids), BLOCK):
        part = slice(start, start + BLOCK)
        bits = np.bitwise_count(train.hashes[part, None] ^ test.hashes[None])
        for row, ours in enumerate(_standardised(train.thumbnails[part])):
            n = start + row
            near = np.flatnonzero(bits[row] <= distance)
            alike = theirs[near] @ ours
            if n in known:
                match, how = known[n], "coco_id"
            elif near.size and alike.max() >= similarity:
                match, how = int(near[alike.argmax()]), "picture"
            else:
                continue
            pairs.append(
                Pair(
                    train=train.ids[n],
                    test=test.ids[match],
                    how=how,
                    distance=int(bits[row, match]),
                    similarity=round(float(theirs[match] @ ours), 4),
                )
            )
    return pairs


def similarities(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Correlation of every thumbnail with every other: uint8 [n, 1024] and [m, 1024] to float32 [n, m]."""
    products: NDArray[np.float32] = _standardised(ours) @ _standardised(theirs).T
    return products


def _standardised(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Rows of mean 0 and length 1, so that a product is a correlation; zeros for a flat picture."""
    values = thumbnails.astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    deviation = values.std(axis=1, keepdims=True)
    scale = np.where(deviation < FLAT, 0, 1 / (np.maximum(deviation, FLAT) * np.sqrt(values.shape[1])))
    standardised: NDArray[np.float32] = (values * scale).astype(np.float32)
    return standardised
