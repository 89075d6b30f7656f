"""What a request brings: base64 of all kinds, limits, and messages that name the field and never the value."""

from __future__ import annotations

import asyncio
import base64

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from rlfseg.config import LimitsConfig
from rlfseg.images import image_to_tensor
from serve import incoming
from serve.incoming import Source, decode, from_base64, phrase_fault, read_request, validate
from serve.refusal import Refusal
from serve.schema import Options, SegmentRequest
from tests.serving.harness import png, scene

LIMITS = LimitsConfig(pixels=5000)


@given(st.binary(max_size=200))
def test_base64_in_all_its_forms(data: bytes) -> None:
    plain = base64.b64encode(data).decode()
    lines = "\r\n".join(plain[n : n + 7] for n in range(0, len(plain), 7))
    forms = [plain, plain.rstrip("="), base64.urlsafe_b64encode(data).decode(), lines, f"data:image/png;base64,{plain}"]
    assert [from_base64(form, "x") for form in forms] == [data] * len(forms)


@pytest.mark.parametrize("text", ["a", "abc$", "ab\0c", "é", "犬犬犬犬", "=a==", "ab=c"])
def test_what_is_not_base64_is_refused_by_field(text: str) -> None:
    with pytest.raises(Refusal, match=r"images\[0\]\.data: not base64") as refusal:
        from_base64(text, "images[0]")
    assert refusal.value.status == 422


def form(content_type: bytes, filename: bytes = b"a.png") -> Request:
    """A request with a picture and a phrase."""
    parts = [
        b'Content-Disposition: form-data; name="phrases"\r\n\r\nred ring',
        b'Content-Disposition: form-data; name="images"; filename="' + filename + b'"\r\n\r\n' + b"picture",
    ]
    body = b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + b"--b--\r\n"

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request({"type": "http", "headers": [(b"content-type", content_type)]}, receive)


@pytest.mark.parametrize("charset", [b"", b"; charset=utf-8", b'; charset="UTF-8"', b"; charset=UTF8"])
def test_forms_are_utf8(charset: bytes) -> None:
    request = form(b"multipart/form-data; boundary=b" + charset, "犬.png".encode())
    options, [source] = asyncio.run(read_request(request, LIMITS))
    assert (options.phrases, source) == (["red ring"], Source(name="犬.png", data=b"picture"))


CHARSETS = [
    b"undefined",
    b"idna",
    b"punycode",
    b"unicode_escape",
    b"utf-7",
    b"latin-1",
    b"hex",
    b"none",
    b"a\0b",
    b'"\0"',
]


@pytest.mark.parametrize("charset", CHARSETS)
@pytest.mark.parametrize(
    "filename", [b"a.png", b"+2AA-.png", b"\\ud800.png", b"\xff.png"]
)  # half a pair, half a letter
def test_forms_in_anything_else_are_refused(charset: bytes, filename: bytes) -> None:
    request = form(b"multipart/form-data; boundary=b; charset=" + charset, filename)
    with pytest.raises(Refusal, match="UTF-8") as refusal:
        asyncio.run(read_request(request, LIMITS))
    assert refusal.value.status == 415


def test_decoding() -> None:
    image = scene(0, (30, 50))
    found = decode(Source(name="a", data=png(image)), "images[0]", limits=LIMITS, resolution=64)
    assert found.size == (30, 50)
    np.testing.assert_array_equal(found.square, image_to_tensor(image, 64).numpy())
    again = decode(Source(name="b", data=base64.b64encode(png(image)).decode()), "x", limits=LIMITS, resolution=64)
    other = decode(Source(name="a", data=png(scene(1, (30, 50)))), "x", limits=LIMITS, resolution=64)
    assert found.key == again.key != other.key


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "picture"),
        (b"no picture", "picture"),
        (png(scene(0))[:200], "picture"),
        (png(scene(0, (80, 80))), "too_large"),
    ],
)
def test_bad_pictures(data: bytes, kind: str) -> None:
    with pytest.raises(Refusal, match=r"images\[7\]") as refusal:
        decode(Source(name="a", data=data), "images[7]", limits=LIMITS, resolution=64)
    assert refusal.value.kind == kind


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "phrases: Field required"),
        ({"phrases": []}, "phrases: "),
        ({"phrases": ["a"], "threshold": "1.5"}, "threshold: "),
        ({"phrases": ["a"], "threshold": float("nan")}, "threshold: "),
        ({"phrases": ["a"], "steps": 0}, "steps: "),
        ({"phrases": ["a"], "rescale": "best"}, "rescale: .*'aos'"),
        ({"phrases": ["a"], "limit": 0.5}, "limit: "),
    ],
)
def test_wrong_options_are_refused_by_field(fields: dict[str, object], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        validate(Options, fields)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"null", b"[]", b'{"images": null}', b'{"phrases": ["\\ud800"]}', b"\xff\xfe"]
)
def test_bodies_that_are_no_request(body: bytes) -> None:
    with pytest.raises(Refusal):
        validate(SegmentRequest, body)


def test_messages_never_repeat_what_was_sent() -> None:
    secret = "s3cret" * 10
    with pytest.raises(Refusal) as refusal:
        validate(Options, {"phrases": ["a"], "threshold": secret, "steps": secret, "output": secret})
    assert secret not in refusal.value.message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phrases": ["a"] * 17}, "17 are more than 16"),
        ({"phrases": ["a"], "steps": 51}, "51 is more than 50"),
        ({"phrases": ["a"], "steps": 2, "rescale": "aos"}, "needs a single step"),
        ({"phrases": ["", " ", "\n"]}, "is empty"),
    ],
)
def test_limits(options: dict[str, object], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        incoming._check(Options.model_validate(options), 1, LimitsConfig())


def test_phrases() -> None:
    assert phrase_fault("red ring", LIMITS) is None
    assert "empty" in str(phrase_fault("\t ", LIMITS))
    assert "longer" in str(phrase_fault("a" * 1001, LIMITS))
