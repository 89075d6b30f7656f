"""The service over real HTTP: masks equal those of the library, whatever picture and phrase come."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from rlfseg.results import Result
from rlfseg.segmenter import Segmenter
from tests.serving.checked import same
from tests.serving.harness import Array, Service, base64_of, mask_of, phrases_of, png, saved, scene

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="session")
def here() -> Segmenter:
    return Segmenter.load("tiny", device="cpu")


def check(answer: dict[str, Any], expected: list[Result]) -> None:
    for entry, result in zip(answer["phrases"], expected, strict=True):
        assert entry["phrase"] == result.caption
        assert same(mask_of(entry), result)
        assert entry["score"] == pytest.approx(result.confidence, abs=0.02)
        assert entry["threshold"] == result.threshold


def test_forms_and_json_give_what_the_segmenter_gives(service: Service, here: Segmenter) -> None:
    image, phrases = png(scene(0)), phrases_of(0)
    form = service.segment([image], phrases)
    assert form.status_code == 200, form.text
    body = {"images": [{"data": base64_of(image), "name": "a.png"}], "phrases": phrases}
    by_json = service.http.post("/v1/segment", json=body)
    assert by_json.status_code == 200, by_json.text
    for reply in (form, by_json):
        [answer] = reply.json()["images"]
        check(answer, here(image, phrases))
        assert (answer["height"], answer["width"], answer["model"]["name"]) == (64, 64, "tiny")
    assert [form.json()["images"][0]["name"], by_json.json()["images"][0]["name"]] == ["0.png", "a.png"]


@pytest.mark.fault("serve-01")
def test_a_corrupt_picture_among_good_requests_fails_alone(service: Service, here: Segmenter) -> None:
    images = [png(scene(n)) for n in range(8)]
    bad = 3
    images[bad] = images[bad][: len(images[bad]) // 2]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda n: service.segment([images[n]], phrases_of(n)), range(8)))
    assert [r.status_code for r in replies] == [422 if n == bad else 200 for n in range(8)]
    for n, reply in enumerate(replies):
        if n != bad:
            check(reply.json()["images"][0], here(images[n], phrases_of(n)))


@pytest.mark.fault("serve-11")
def test_one_bad_element_leaves_the_others(service: Service, here: Segmenter) -> None:
    images = [png(scene(0)), b"<html>404</html>", b"", png(scene(1))]
    reply = service.segment(images, ["red ring", "  ", "blue star"])
    assert reply.status_code == 200
    entries = reply.json()["images"]
    assert [e["status"] for e in entries] == ["ok", "error", "error", "ok"]
    for n, entry in ((0, entries[0]), (3, entries[3])):
        assert [p["status"] for p in entry["phrases"]] == ["ok", "error", "ok"]
        for place, result in zip((0, 2), here(images[n], ["red ring", "blue star"]), strict=True):
            assert same(mask_of(entry["phrases"][place]), result)


@pytest.mark.fault("serve-06")
@pytest.mark.parametrize("form", ["unpadded", "lines", "url-safe", "empty", "abc", "null"])
def test_base64_of_all_kinds(service: Service, form: str) -> None:
    data = png(scene(0))
    data += b"\0" * (-(len(data) + 1) % 3)  # so that there is padding to leave away; decoders stop before it
    plain = base64_of(data)
    text = {
        "unpadded": plain.rstrip("="),
        "lines": "\n".join(plain[n : n + 76] for n in range(0, len(plain), 76)),
        "url-safe": plain.replace("+", "-").replace("/", "_"),
        "empty": "",
        "abc": "abc",
        "null": None,
    }[form]
    reply = service.http.post("/v1/segment", json={"images": [{"data": text}], "phrases": ["red ring"]})
    if form in ("unpadded", "lines", "url-safe"):
        assert reply.status_code == 200, reply.text
    else:
        assert reply.status_code == 422
        message = reply.json()["error"]["message"]
        assert message.startswith("images.0.data" if text is None else "images[0]"), message


@pytest.mark.fault("serve-08")
def test_pictures_of_many_sizes_at_once(service: Service, here: Segmenter) -> None:
    sizes = [(1344, 1008), (1008, 1344), (64, 64)]
    asked = [(png(scene(n, sizes[n % 3])), phrases_of(0) * 2) for n in range(10)]
    asked = [(image, own[: n % 5 + 1]) for n, (image, own) in enumerate(asked)]
    with ThreadPoolExecutor(10) as pool:
        replies = list(pool.map(lambda a: service.segment([a[0]], a[1]), asked))
    assert [r.status_code for r in replies] == [200] * 10
    for n, (reply, (image, own)) in enumerate(zip(replies, asked, strict=True)):
        [answer] = reply.json()["images"]
        assert (answer["height"], answer["width"]) == sizes[n % 3]
        check(answer, here(image, own))


@pytest.mark.fault("serve-03")
def test_clients_that_go_away_leave_no_trace(service: Service) -> None:
    before = {p.pid for name in ("Front", "Model") for p in service.replicas(name)}
    image = png(scene(0, (300, 300)))

    async def ask(client: httpx.AsyncClient) -> int:
        form = {"phrases": ["red ring"], "steps": "30"}  # the model works on it for a while
        return (await client.post("/v1/segment", files=[("images", ("a.png", image))], data=form)).status_code

    async def go() -> list[Any]:
        headers, limits = {"X-API-Key": service.key}, httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=service.url, headers=headers, timeout=100, limits=limits) as client:
            tasks = [asyncio.create_task(ask(client)) for _ in range(200)]
            for first in asyncio.as_completed(tasks):
                if await first == 200:  # the model is at work, and its queue and the front's are full
                    break
            waiting = [task for task in tasks if not task.done()]
            for task in waiting[::2]:
                task.cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    ends = asyncio.run(go())
    assert {e for e in ends if isinstance(e, int)} <= {200, 503}
    assert sum(isinstance(e, asyncio.CancelledError) for e in ends) > 10
    for n in range(20):
        assert service.segment([png(scene(n))], ["red ring"]).status_code == 200
    assert {p.pid for name in ("Front", "Model") for p in service.replicas(name)} == before

    def queued() -> dict[str, float]:
        names = ("ray_serve_batch_queue_length", "ray_serve_deployment_queued_queries", "ray_serve_num_ongoing")
        return {name: value for name, value in service.metrics().items() if name.startswith(names) and value}

    until = time.monotonic() + 30
    while queued() and time.monotonic() < until:
        time.sleep(0.2)  # replicas export at intervals
    assert queued() == {}


@pytest.mark.fault("serve-10")
def test_a_model_loaded_meanwhile_disturbs_no_other(service: Service, here: Segmenter, other_adapter: Path) -> None:
    other = Segmenter.load(str(other_adapter), device="cpu")
    versions = {m["name"]: m["version"] for m in service.http.get("/v1/models").json()["models"]}
    assert versions["tiny"] != versions["other"]
    image, phrases = png(scene(0)), phrases_of(0)
    names = ["tiny", "tiny", "other"] * 5  # one fits in memory: each "other" drives "tiny" out
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda name: service.segment([image], phrases, model=name), names))
    expected = {"tiny": here(image, phrases), "other": other(image, phrases)}
    assert not same(expected["tiny"][0].mask, expected["other"][0])
    for name, reply in zip(names, replies, strict=True):
        assert reply.status_code == 200, reply.text
        [answer] = reply.json()["images"]
        assert answer["model"] == {"name": name, "version": versions[name]}
        check(answer, expected[name])


def test_a_known_picture_is_not_encoded_again(service: Service) -> None:
    image = png(scene(77))
    first, second = (service.segment([image], [phrase]).json()["images"][0] for phrase in ("red ring", "blue star"))
    assert (first["cached"], second["cached"]) == (False, True)
    assert first["timing_ms"]["encode"] > second["timing_ms"]["encode"] == 0


def test_all_forms_of_a_mask_agree(service: Service, here: Segmenter) -> None:
    image, phrases = png(scene(0, (50, 90))), phrases_of(0)[:1]
    [expected] = here(image, phrases)
    found = {}
    for output in ("rle", "png", "score", "polygons"):
        reply = service.segment([image], phrases, output=output, threshold=0.4)
        [found[output]] = reply.json()["images"][0]["phrases"]
        assert found[output]["mask"]["format"] == output

    def pixels(output: str) -> Array:
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(found[output]["mask"]["data"]))))

    np.testing.assert_allclose(pixels("score") / 65535, expected.score, atol=1e-3)
    assert np.array_equal(pixels("png"), mask_of(found["rle"]) * 255)
    assert same(mask_of(found["rle"]), replace(expected, threshold=0.4))
    assert found["polygons"]["area"] == found["rle"]["area"] == mask_of(found["rle"]).sum()


def test_streaming(service: Service) -> None:
    files = [("images", (f"{n}.png", png(scene(n, (1200, 1200))))) for n in range(8)]
    start, arrived = time.perf_counter(), []
    with service.http.stream(
        "POST", "/v1/segment", files=files, data={"phrases": "red ring", "stream": "true"}
    ) as reply:
        lines = []
        for line in reply.iter_lines():
            lines.append(json.loads(line))
            arrived.append(1000 * (time.perf_counter() - start))
    assert sorted(line["index"] for line in lines[:-1]) == list(range(8))
    assert (lines[-1]["ok"], lines[-1]["failed"], lines[-1]["done"]) == (8, 0, True)
    # By the service's clock, which starts later than ours: the first came before the rest was done
    assert arrived[0] < lines[-1]["total_ms"]


def answer_to(service: Service, data: bytes, phrases: Sequence[str] = ("red ring",)) -> dict[str, Any]:
    reply = service.segment([data], phrases)
    assert reply.status_code == 200, reply.text
    return dict(reply.json()["images"][0])


def scores_of(service: Service, data: bytes) -> Array:
    reply = service.segment([data], ["red ring"], output="score")
    [entry] = reply.json()["images"][0]["phrases"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["mask"]["data"])))) / 65535


# --- pictures and phrases as they come -----------------------------------------------------------------------------


@pytest.mark.fault("image-01")
def test_exif_rotation(service: Service) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = saved(Image.fromarray(scene(0, (20, 40))), "JPEG", exif=exif, quality=95)
    answer = answer_to(service, turned)
    assert (answer["height"], answer["width"]) == (40, 20)
    assert answer["phrases"][0]["mask"]["size"] == [40, 20]


@pytest.mark.fault("image-03")
def test_a_16_bit_ramp_is_seen_as_the_8_bit_one(service: Service) -> None:
    ramp = np.tile(np.arange(256), (64, 1))
    wide = scores_of(service, png((ramp * 257).astype(np.uint16)))
    np.testing.assert_allclose(wide, scores_of(service, png(ramp.astype(np.uint8))), atol=1e-3)


@pytest.mark.fault("image-04")
def test_transparency_is_laid_on_white(service: Service) -> None:
    image = Image.new("P", (64, 64), 0)
    image.putpalette([255, 0, 255, 10, 200, 10])
    image.paste(1, (10, 10, 30, 30))
    white = np.full((64, 64, 3), 255, np.uint8)
    white[10:30, 10:30] = 10, 200, 10
    np.testing.assert_allclose(
        scores_of(service, saved(image, transparency=0)), scores_of(service, png(white)), atol=1e-3
    )


@pytest.mark.fault("image-06")
def test_cmyk(service: Service) -> None:
    red = Image.new("RGB", (64, 64), (255, 0, 0))
    cmyk = saved(red.convert("CMYK"), "JPEG", quality=100)
    np.testing.assert_allclose(scores_of(service, cmyk), scores_of(service, saved(red)), atol=0.05)


@pytest.mark.fault("image-07")
@pytest.mark.parametrize("side", [20_000, 13_000])
def test_bombs_are_refused_early(service: Service, side: int) -> None:
    row = zlib.compress(b"\0" * (side // 8 + 1) * 64, 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", row), (b"IEND", b"")]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
    )
    [front] = service.replicas("Front")
    Path(f"/proc/{front.pid}/clear_refs").write_text("5")  # its peak counts from here
    before, seconds = peak(front.pid), []
    for _ in range(3):
        start = time.monotonic()
        reply = service.segment([bomb], ["red ring"])
        seconds.append(time.monotonic() - start)
        assert reply.status_code == 413
        assert "pixels" in reply.json()["error"]["message"]
    assert min(seconds) < 1
    assert peak(front.pid) - before < 100 * 2**20


def peak(pid: int) -> int:
    """Most memory that a process has held, in bytes."""
    [line] = [n for n in Path(f"/proc/{pid}/status").read_text().splitlines() if n.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


@pytest.mark.fault("image-09")
def test_files_are_read_by_what_they_are(service: Service) -> None:
    webp = saved(Image.fromarray(scene(0)), "WEBP", lossless=True)
    files = [("images", (name, data)) for name, data in (("a.jpg", webp), ("b.jpg", b"<html>"), ("c.png", b""))]
    reply = service.http.post("/v1/segment", files=files, data={"phrases": "red ring"})
    assert [(e["name"], e["status"]) for e in reply.json()["images"]] == [
        ("a.jpg", "ok"),
        ("b.jpg", "error"),
        ("c.png", "error"),
    ]


@pytest.mark.fault("image-10")
def test_a_truncated_jpeg_is_never_filled_up(service: Service) -> None:
    whole = saved(Image.fromarray(scene(0, (200, 200))), "JPEG")
    reply = service.segment([whole[: len(whole) // 2]], ["red ring"])
    assert (reply.status_code, reply.json()["error"]["kind"]) == (422, "picture")


@pytest.mark.fault("image-11")
@pytest.mark.parametrize("size", [(1, 1), (1, 600), (600, 1), (3, 500)])
def test_odd_sizes(service: Service, size: tuple[int, int]) -> None:
    answer = answer_to(service, png(scene(0, size)))
    assert mask_of(answer["phrases"][0]).shape == size


@pytest.mark.fault("image-13")
@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(service: Service, kind: str) -> None:
    frames = [Image.fromarray(scene(n)) for n in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    moving = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    still = np.asarray(Image.open(io.BytesIO(moving)).convert("RGB"))
    np.testing.assert_allclose(scores_of(service, moving), scores_of(service, png(still)), atol=1e-3)


@pytest.mark.fault("token-01")
def test_long_phrases_are_flagged(service: Service) -> None:
    long = " ".join(["ring"] * 120)
    answer = answer_to(service, png(scene(0)), [f"{long} red", f"{long} blue", "red ring"])
    first, second, short = answer["phrases"]
    assert (first["truncated"], second["truncated"], short["truncated"]) == (True, True, False)
    assert first["mask"] == second["mask"]
    [longest] = answer_to(service, png(scene(0)), [" ".join(["ring"] * 200)])["phrases"]
    assert longest["truncated"]
    assert longest["mask"] == first["mask"]
    reply = service.segment([png(scene(0))], [" ".join(["ringlike"] * 200)])
    assert (reply.status_code, reply.json()["error"]["kind"]) == (422, "invalid")


@pytest.mark.fault("token-03")
def test_phrases_of_any_script(service: Service, here: Segmenter) -> None:
    phrases = ["résumé", "犬", "🐕 ring"]
    image = png(scene(0))
    check(answer_to(service, image, phrases), here(image, phrases))
    for empty in ("", "   "):
        assert service.segment([image], [empty]).status_code == 422
