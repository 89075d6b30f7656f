"""What a sample is, what it may hold, and how its texts become names; no file format."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from rlfseg.errors import BadSample
from rlfseg.images import MAX_PIXELS


@dataclass(frozen=True, kw_only=True, eq=False)
class Labelled:
    """One phrase of a sample.

    Attributes:
        caption: The phrase, exactly.
        mask: uint8 {0, 1} [H, W].
        instances: The mask of each object meant, uint8 {0, 1} [n, H, W]; their OR is `mask`. None where unknown.
        task: Its id in the source, where it has one.
    """

    caption: str
    mask: NDArray[np.uint8]
    instances: NDArray[np.uint8] | None = None
    task: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One picture with its phrases.

    Attributes:
        id: Its id, unique in a data set.
        image: uint8 RGB [H, W, 3].
        phrases: In order; a caption may come twice.
        coco_id: The id of the same picture in COCO, where the source tells: what `audit` compares first.
    """

    id: str
    image: NDArray[np.uint8]
    phrases: tuple[Labelled, ...]
    coco_id: str | None = None


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED = re.compile(r"/|\0|^\.|^%\Z|%(?=[0-9A-F]{2})")


def escape(text: str) -> str:
    """Any text as a name that HDF5 can hold: `/`, NUL, a leading dot and a confusable `%` as `%XX`, nothing as `%`."""
    return _ESCAPED.sub(lambda m: f"%{ord(m[0]):02X}", text) or "%"


def unescape(name: str) -> str:
    """The text whose `escape` is `name`."""
    return "" if name == "%" else re.sub("%([0-9A-F]{2})", lambda m: chr(int(m[1], 16)), name)


def check_sample(sample: Sample, *, file: str) -> None:
    """Refuses what could not be written, or not be read back exactly.

    Args:
        sample: The sample.
        file: For messages.

    Raises:
        BadSample: A shape, type or value that `Sample` doesn't allow, or text that isn't Unicode (lone surrogates).
    """
    bad = partial(BadSample, file=file, sample=ascii(sample.id)[1:-1])
    for what, text in _texts(sample):
        if _LONE_SURROGATE.search(text):
            raise bad(f"{what} {quoted(text)} isn't Unicode text: it has a lone surrogate")
    image = sample.image
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not 0 < image[..., 0].size <= MAX_PIXELS:
        raise bad(f"the image must be uint8 [H, W, 3], this is {image.dtype} {list(image.shape)}")
    for phrase in sample.phrases:
        if wrong := _wrong_masks(phrase, image.shape[:2]):
            raise bad(wrong)


def _texts(sample: Sample) -> list[tuple[str, str]]:
    texts = [("the id", sample.id), ("the COCO id", sample.coco_id or "")]
    for phrase in sample.phrases:
        texts += [("the caption", phrase.caption), ("the task", phrase.task or "")]
    return texts


def _wrong_masks(phrase: Labelled, shape: tuple[int, ...]) -> str | None:
    mask, instances, caption = phrase.mask, phrase.instances, quoted(phrase.caption)
    if mask.dtype != np.uint8 or mask.shape != shape or mask.max() > 1:
        found = f"{mask.dtype} {list(mask.shape)} up to {mask.max(initial=0)}"
        return f"the mask of {caption} must be uint8 0/1 {list(shape)}, this is {found}"
    if instances is None:
        return None
    if instances.dtype != np.uint8 or instances.ndim != 3 or instances.shape[1:] != shape:
        found = f"{instances.dtype} {list(instances.shape)}"
        return f"the instances of {caption} must be uint8 [n, {shape[0]}, {shape[1]}], not {found}"
    if not np.array_equal(np.bitwise_or.reduce(instances, axis=0), mask):
        return f"the instances of {caption} don't add up to its mask"
    return None


def quoted(text: str) -> str:
    """A text for an error's message: in ASCII, and not the whole of a very long one."""
    return ascii(text if len(text) <= 100 else f"{text[:97]}...")


def fingerprint(sample: Sample) -> bytes:
    """A hash of everything in a sample, the same on any machine, to prove that it came through unchanged."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([sample.id, sample.coco_id, sample.image.shape]).encode())
    digest.update(sample.image.tobytes())
    for p in sample.phrases:
        digest.update(json.dumps([p.caption, p.task, None if p.instances is None else p.instances.shape]).encode())
        digest.update(p.mask.tobytes())
        digest.update(b"" if p.instances is None else p.instances.tobytes())
    return digest.digest()
