"""From a request's body to options and pictures, with limits before anything is decoded."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.requests import Request

from rlfseg import images
from rlfseg.config import LimitsConfig
from rlfseg.errors import BadSample
from serve.guard import FORM
from serve.refusal import Refusal
from serve.schema import BatchRequest, Options, SegmentRequest

MOST_FIELDS, FIELD_BYTES = 100, 64 * 1024  # of a form, beside its files
URL_SAFE = str.maketrans("-_", "+/", " \t\r\n")
T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A picture as it came: the bytes of its file, or the same in base64."""

    name: str
    data: bytes | str


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A picture ready for the network.

    Attributes:
        key: Hash of the file's bytes, by which its latent is remembered.
        size: (H, W).
        square: float32 [3, R, R] in [-1, 1].
    """

    key: str
    size: tuple[int, int]
    square: NDArray[np.float32]


async def read_request(request: Request, limits: LimitsConfig) -> tuple[Options, list[Source]]:
    """Reads a form or JSON.

    Args:
        request: Of `POST /v1/segment`; its length is bounded by the guard.
        limits: What may be asked.

    Returns:
        How to segment, and what.

    Raises:
        Refusal: Something is missing, of the wrong type, or beyond the limits.
    """
    if request.headers["content-type"].lower().startswith(FORM):
        options, sources = await _read_form(request, limits)
    else:
        body = await request.body()
        asked = await asyncio.to_thread(validate, SegmentRequest, body)
        options, sources = asked, [Source(name=p.name, data=p.data) for p in asked.images]
    _check(options, len(sources), limits)
    return options, sources


async def _read_form(request: Request, limits: LimitsConfig) -> tuple[Options, list[Source]]:
    _check_charset(request.headers["content-type"])
    most = MOST_FIELDS + limits.phrases
    async with request.form(max_files=limits.images, max_fields=most, max_part_size=FIELD_BYTES) as form:
        fields: dict[str, Any] = {}
        sources = []
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name != "images":
                    raise Refusal("invalid", f"{name[:100]!r} is a file; files are sent as `images`")
                sources.append(Source(name=(value.filename or "")[:200], data=await value.read()))
            elif name == "phrases":
                fields.setdefault(name, []).append(value)
            elif name in fields:
                raise Refusal("invalid", f"{name[:100]!r} is given twice")
            else:
                fields[name] = value
    if "images" in fields or not sources:
        raise Refusal("invalid", "images: send one or more files with a file name, as in `-F images=@a.jpg`")
    return validate(Options, fields), sources


def _check_charset(content_type: str) -> None:
    """The parser of forms takes any codec by its name: some raise errors of their own, some make half characters."""
    _, options = parse_options_header(content_type)
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        raise Refusal("media_type", "content-type: forms are sent in UTF-8; leave `charset` away")


def validate(kind: type[T], data: bytes | dict[str, Any]) -> T:
    """Checks data against a model of the schema.

    Args:
        kind: The model.
        data: JSON, or fields.

    Returns:
        The checked model.

    Raises:
        Refusal: Each wrong field with what is allowed; never with the value, which may be a picture.
    """
    try:
        return kind.model_validate_json(data) if isinstance(data, bytes) else kind.model_validate(data)
    except ValidationError as error:
        raise Refusal("invalid", wrong_fields(error.errors(include_input=False, include_url=False))) from None


def wrong_fields(errors: Any) -> str:
    """Pydantic's list of errors as one line."""
    return "; ".join(f"{'.'.join(str(part)[:100] for part in e['loc']) or 'body'}: {e['msg']}" for e in errors[:5])


def _check(options: Options, pictures: int, limits: LimitsConfig) -> None:
    if pictures > limits.images:
        raise Refusal("invalid", f"images: {pictures} are more than {limits.images}, the most of one request")
    if len(options.phrases) > limits.phrases:
        raise Refusal("invalid", f"phrases: {len(options.phrases)} are more than {limits.phrases}")
    check_steps(options, limits)
    faults = [phrase_fault(p, limits) for p in options.phrases]
    if all(faults):
        raise Refusal("invalid", f"phrases: {faults[0]}")


def check_steps(asked: Options | BatchRequest, limits: LimitsConfig) -> None:
    """Raises Refusal where there are too many, or more than the one that AOS and HSS scale."""
    if asked.steps > limits.steps:
        raise Refusal("invalid", f"steps: {asked.steps} is more than {limits.steps}")
    if asked.rescale != "none" and asked.steps != 1:
        raise Refusal("invalid", f"steps: {asked.steps} with rescale {asked.rescale}, which needs a single step")


def phrase_fault(phrase: str, limits: LimitsConfig) -> str | None:
    """What is wrong with a phrase; None if it can be asked."""
    if not phrase.strip():
        return f"the phrase {phrase[:20]!r} is empty"
    if len(phrase) > limits.phrase_chars:
        return f"a phrase of {len(phrase)} characters is longer than {limits.phrase_chars}"
    return None


def decode(source: Source, where: str, *, limits: LimitsConfig, resolution: int) -> Decoded:
    """A picture's bytes as what the network takes.

    Args:
        source: As it came.
        where: What errors call it.
        limits: Bounds its pixels, by its header, before they are decoded.
        resolution: Side R of the network's square.

    Returns:
        The picture's size, its pixels in the square, and the key of its bytes.

    Raises:
        Refusal: It is no picture, damaged, or too large.
    """
    data = from_base64(source.data, where) if isinstance(source.data, str) else source.data
    if not data:
        raise Refusal("picture", f"{where}: empty")
    try:
        image = images.load_image(data, name=where, max_pixels=limits.pixels)
    except BadSample as error:
        kind = "too_large" if isinstance(error.__cause__, images.BOMB) else "picture"
        raise Refusal(kind, str(error)) from None
    square = images.image_to_tensor(image, resolution).numpy()
    return Decoded(key=hashlib.sha256(data).hexdigest(), size=image.shape[:2], square=square)


def from_base64(text: str, where: str) -> bytes:
    """Base64 in any of its common forms: padded or not, URL-safe or not, with line breaks, or as a data URL.

    Args:
        text: What was sent.
        where: What errors call it.

    Returns:
        The bytes.

    Raises:
        Refusal: It is none of these.
    """
    text = text.partition(",")[2] if text.startswith("data:") else text
    plain = text.translate(URL_SAFE).rstrip("=")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters beyond ASCII
        raise Refusal("invalid", f"{where}.data: not base64: {error}") from None
