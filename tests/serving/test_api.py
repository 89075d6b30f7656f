"""The HTTP interface without Ray: answers, trouble, forms and the OpenAPI page, with a model that is played."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from rlfseg.config import LimitsConfig, ServeConfig
from rlfseg.results import Square
from serve.guard import Door, Guard, Keys, request_id
from serve.messages import Answer, Ask
from serve.refusal import Refusal
from serve.work import AskModel
from tests.serving.harness import base64_of, png, scene
from tests.serving.played import IMAGE, LIMITS, PHRASES, Counted, build, call, kind, shipped


@pytest.fixture(scope="module")
def ask() -> AskModel:
    return shipped()


def segment(api: FastAPI, images: list[bytes] | None = None, phrases: list[str] | None = None, **options: Any) -> Any:
    pictures = [{"data": base64_of(image)} for image in ([IMAGE] if images is None else images)]
    return call(api, "POST", "/v1/segment", json={"images": pictures, "phrases": phrases or PHRASES, **options})


# --- answers -------------------------------------------------------------------------------------------------------


def test_entries_come_in_order_and_each_stands_alone(ask: AskModel) -> None:
    meters = Counted()
    images = [IMAGE, b"no picture", png(scene(1))]
    reply = segment(build(ask, meters=meters), images, ["red ring", " ", "x" * 1001])
    assert reply.status_code == 200
    entries = reply.json()["images"]
    assert [(e["index"], e["status"]) for e in entries] == [(0, "ok"), (1, "error"), (2, "ok")]
    assert entries[1]["error"]["kind"] == "picture"
    assert "images[1]" in entries[1]["error"]["message"]
    for entry in (entries[0], entries[2]):
        assert [p["status"] for p in entry["phrases"]] == ["ok", "error", "error"]
    assert (meters.pictures, meters.errors) == (2, {"picture": 1, "invalid": 4})


def test_where_all_pictures_fail_the_status_is_the_first_ones(ask: AskModel) -> None:
    assert kind(segment(build(ask), [b"no picture", png(scene(0, (80, 80)))])) == (422, "picture")
    assert kind(segment(build(ask), [png(scene(0, (80, 80))), b"no picture"])) == (413, "too_large")


def test_streamed_lines_are_the_same_entries(ask: AskModel) -> None:
    api = build(ask)
    images = [IMAGE, b"no picture", png(scene(1))]
    whole = segment(api, images).json()["images"]
    reply = segment(api, images, stream=True)
    assert reply.headers["content-type"].startswith("application/x-ndjson")
    *lines, end = (json.loads(line) for line in reply.text.splitlines())
    assert (end["done"], end["ok"], end["failed"]) == (True, 2, 1)

    def plain(entries: list[Any]) -> list[Any]:
        left_out = ("timing_ms", "cached", "batch")
        return [{k: v for k, v in e.items() if k not in left_out} for e in sorted(entries, key=lambda e: e["index"])]

    assert plain(lines) == plain(whole)


def test_an_answer_that_grows_too_large_ends_in_errors(ask: AskModel) -> None:
    png_bytes = len(
        segment(build(ask), [IMAGE], ["red ring"], output="score").json()["images"][0]["phrases"][0]["mask"]["data"]
    )
    limits = replace(LIMITS, answer_mb=2.5 * png_bytes / 2**20)
    reply = segment(build(ask, limits=limits), [IMAGE] * 3, ["red ring"], output="score")
    entries = [p for e in reply.json()["images"] for p in e["phrases"]]
    assert sorted(p["status"] for p in entries) == ["error", "ok", "ok"]
    assert next(p for p in entries if p["status"] == "error")["error"]["kind"] == "too_large"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "none"}, "model: 'none' is none of tiny"),
        ({"steps": 51}, "steps"),
        ({"rescale": "aos", "steps": 2}, "single step"),
        ({"rescale": "best"}, "rescale"),
        ({"output": "gif"}, "output"),
        ({"steps": 41, "phrases": ["a"] * 4}, "4 phrases with 41 steps are 164 passes, more than 160"),
        ({"phrases": ["a"] * 5}, "5 are more than 4"),
        ({"phrases": [" "]}, "empty"),
        ({"images": [IMAGE] * 4}, "4 are more than 3"),
        ({"images": []}, "images"),
        ({"tresh": 1}, "tresh"),
    ],
)
def test_what_cannot_be_asked(ask: AskModel, options: dict[str, Any], message: str) -> None:
    reply = segment(build(ask), **options)
    assert reply.status_code == (404 if "model" in options else 422)
    assert message in reply.json()["error"]["message"]


def test_passes_that_may_be_asked(ask: AskModel) -> None:
    api = build(ask, limits=replace(LIMITS, passes=10))
    assert segment(api, phrases=["a", "b"], steps=5).status_code == 200
    assert kind(segment(api, phrases=["a", "b"], steps=6)) == (422, "invalid")
    assert segment(api, phrases=["a", "b"], rescale="hss").json()["images"][0]["status"] == "ok"
    assert "3 phrases with 5 steps are 15" in segment(api, phrases=["a", "b", "c"], rescale="hss").text


def test_a_model_that_is_not_calibrated_does_not_rescale(ask: AskModel, tmp_path: Path) -> None:
    (tmp_path / "rlfseg.yaml").write_text("base: tiny\nresolution: 64\n")
    reply = segment(build(ask, models={"raw": str(tmp_path)}), rescale="hss")
    assert kind(reply) == (422, "invalid")
    assert "raw" in reply.json()["error"]["message"]


def failing(error: BaseException) -> AskModel:
    async def answer(name: str, asked: Ask) -> Answer:
        raise error

    return answer


# --- when there is trouble -----------------------------------------------------------------------------------------


def test_a_full_queue_is_503_and_says_when_to_come_back() -> None:
    reply = segment(build(failing(Refusal("overloaded", "full"))))
    assert kind(reply) == (503, "overloaded")
    assert reply.headers["retry-after"] == "2"


class Queue:
    """A model with room for few."""

    def __init__(self, room: int):
        self.room, self.inside, self.asked = room, 0, list[str]()

    async def __call__(self, name: str, asked: Ask) -> Answer:
        self.asked.append(asked.request)
        if self.inside == self.room:
            raise Refusal("overloaded", "full")
        self.inside += 1
        await asyncio.sleep(0.02)
        self.inside -= 1
        scores = Square(caption="", score=torch.zeros(64, 64), gamma=0.0, clipped=False, truncated=False)
        version = {"version": "v", "threshold": 0.5, "cached": False, "batch": 1}
        return Answer(squares=[scores] * len(asked.phrases), **version, encode_ms=1, network_ms=1)


def test_pictures_of_an_admitted_request_wait_for_their_places() -> None:
    queue, meters = Queue(1), Counted()
    reply = segment(build(queue, limits=LimitsConfig(), meters=meters), [png(scene(n)) for n in range(6)])
    assert [e["status"] for e in reply.json()["images"]] == ["ok"] * 6
    assert len(queue.asked) > 6  # some met a full queue
    assert meters.errors == {}


def test_a_request_without_any_place_is_refused_at_once() -> None:
    queue = Queue(0)
    reply = segment(build(queue, limits=LimitsConfig()), [IMAGE] * 6)
    assert kind(reply) == (503, "overloaded")
    assert len(queue.asked) == 6


def test_waiting_for_a_place_ends_at_the_deadline() -> None:
    places = iter([True])

    async def one_only(name: str, asked: Ask) -> Answer:
        if next(places, False):
            return await Queue(1)(name, asked)
        raise Refusal("overloaded", "full")

    reply = segment(build(one_only, limits=LimitsConfig(deadline_s=0.5)), [IMAGE] * 2)
    entries = reply.json()["images"]
    assert sorted(e["status"] if e["status"] == "ok" else e["error"]["kind"] for e in entries) == ["deadline", "ok"]


def test_the_model_is_told_the_requests_id() -> None:
    queue = Queue(8)
    body = {"images": [{"data": base64_of(IMAGE)}] * 2, "phrases": ["a"]}
    reply = call(build(queue), "POST", "/v1/segment", json=body, headers={"X-Request-ID": "ticket-4711"})
    assert reply.json()["request_id"] == "ticket-4711"
    assert queue.asked == ["ticket-4711"] * 2
    for bad in (b"", b"\xff", b"a b", b"9" * 129):
        reply = call(build(queue), "POST", "/v1/segment", json=body, headers={"X-Request-ID": bad})
        assert reply.json()["request_id"] == queue.asked[-1] == queue.asked[-2]
        assert len(queue.asked[-1]) == 32


@pytest.mark.parametrize("given", [b"", b"\xff", b"a b", b"9" * 129])
def test_one_id_for_all_who_ask_for_it(given: bytes) -> None:
    async def told(scope: Scope, receive: Receive, send: Send) -> None:
        ids = [request_id(Headers(scope=scope)) for _ in range(2)]
        await JSONResponse(ids)(scope, receive, send)

    gate = Guard(told, config=ServeConfig(), keys=None, meters=Counted(), door=Door())
    first, second = call(gate, "GET", "/", headers={"X-Request-ID": given}).json()
    assert first == second != given.decode("latin-1")


def test_a_closed_door_waits_for_those_inside() -> None:
    left = asyncio.Event()

    async def slow(name: str, asked: Ask) -> Answer:
        await left.wait()
        return await Queue(1)(name, asked)

    async def go() -> None:
        api = build(slow, limits=LimitsConfig())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://localhost") as client:
            body = {"images": [{"data": base64_of(IMAGE)}], "phrases": ["a"]}
            inside = asyncio.create_task(client.post("/v1/segment", json=body))
            while not api.state.door.inside:
                await asyncio.sleep(0.01)
            closing = asyncio.create_task(api.state.door.close())
            await asyncio.sleep(0.2)
            assert not closing.done()
            for method, path in (("POST", "/v1/segment"), ("GET", "/readyz")):
                assert kind(await client.request(method, path, json=body)) == (503, "stopping")
            assert (await client.get("/healthz")).status_code == 200
            left.set()
            assert (await inside).status_code == 200
            await closing
            assert api.state.door.inside == 0

    asyncio.run(asyncio.wait_for(go(), 20))


def test_a_deadline_is_504_and_gives_up_the_place() -> None:
    gone = []

    async def slow(name: str, asked: Ask) -> Answer:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            gone.append(name)
            raise
        raise AssertionError

    reply = segment(build(slow, limits=LimitsConfig(deadline_s=0.3)))
    assert kind(reply) == (504, "deadline")
    assert gone == ["tiny"]


def test_a_client_that_goes_away_gives_up_its_places() -> None:
    started: list[str] = []
    gone: list[str] = []

    async def slow(name: str, asked: Ask) -> Answer:
        started.append(name)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            gone.append(name)
            raise
        raise AssertionError

    async def go() -> None:
        transport = httpx.ASGITransport(build(slow, limits=LimitsConfig()))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"images": [{"data": base64_of(IMAGE)}] * 3, "phrases": ["a"]}
            request = asyncio.create_task(client.post("/v1/segment", json=body))
            while len(started) < 3:
                await asyncio.sleep(0.01)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            while len(gone) < 3:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(go(), 20))


def test_an_internal_error_tells_no_more_than_its_id(ask: AskModel) -> None:
    reply = segment(build(failing(KeyError("a secret path"))))
    assert kind(reply) == (500, "failed")
    assert "secret" not in reply.text

    async def broken() -> bool:
        raise KeyError("a secret path")

    reply = call(build(ask, ready=broken), "GET", "/readyz")
    assert kind(reply) == (500, "failed")
    assert "secret" not in reply.text


def test_not_ready(ask: AskModel) -> None:
    async def never() -> bool:
        return False

    api = build(ask, ready=never)
    assert call(api, "GET", "/healthz").status_code == 200
    for reply in (call(api, "GET", "/readyz"), segment(api)):
        assert kind(reply) == (503, "starting")
        assert reply.headers["retry-after"]


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    (tmp_path / "keys").write_text("# ours\nfirst-key\nsecond-key\n\n")
    return Keys(str(tmp_path / "keys"))


# --- forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "fields", "message"),
    [
        ([], {"phrases": "a"}, "images"),
        ([("images", ("a.png", IMAGE))], {}, "phrases"),
        ([("images", ("a.png", IMAGE)), ("mask", ("a.png", IMAGE))], {"phrases": "a"}, "'mask' is a file"),
        ([("images", ("a.png", IMAGE))], {"phrases": "a", "steps": ["1", "2"]}, "'steps' is given twice"),
        ([("images", ("a.png", IMAGE))], {"phrases": "a", "images": "b"}, "images"),
        ([("images", ("a.png", IMAGE))] * 4, {"phrases": "a"}, "3"),
        ([("images", ("a.png", IMAGE))], {"phrases": "a", "threshold": "high"}, "threshold"),
    ],
)
def test_wrong_forms(ask: AskModel, files: list[Any], fields: dict[str, Any], message: str) -> None:
    parts = files or [("nothing", (None, "x"))]
    reply = call(build(ask), "POST", "/v1/segment", files=parts, data=fields)
    assert reply.status_code == 422
    assert message in reply.json()["error"]["message"]


def test_broken_multipart(ask: AskModel) -> None:
    headers = {"Content-Type": "multipart/form-data"}
    assert call(build(ask), "POST", "/v1/segment", content=b"x", headers=headers).status_code == 422
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    for body in (b"", b"--b\r\n", b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--", b"\0" * 100):
        assert call(build(ask), "POST", "/v1/segment", content=body, headers=headers).status_code == 422


# --- OpenAPI -------------------------------------------------------------------------------------------------------


def test_the_examples_of_the_openapi_page_work(ask: AskModel) -> None:
    api = build(ask)
    tree = call(api, "GET", "/openapi.json").json()
    body = tree["paths"]["/v1/segment"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "multipart/form-data"}
    examples = tree["components"]["schemas"]["SegmentRequest"]["examples"]
    assert len(examples) == 2
    for example in examples:
        assert call(api, "POST", "/v1/segment", json=example).status_code == 200


def test_every_reference_of_the_openapi_page_leads_somewhere(ask: AskModel, keys: Keys) -> None:
    tree = call(build(ask), "GET", "/openapi.json").json()
    names = {part.split('"')[0] for part in json.dumps(tree).split("#/components/schemas/")[1:]}
    assert names <= set(tree["components"]["schemas"])
    assert "security" not in tree
    with_key = call(build(ask, keys=keys), "GET", "/openapi.json", headers={"X-API-Key": "first-key"}).json()
    assert set(with_key["components"]["securitySchemes"]) == {"bearer", "header"}


def test_the_page_loads_nothing_from_elsewhere(ask: AskModel) -> None:
    reply = call(build(ask), "GET", "/")
    assert reply.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert call(build(ask), "GET", "/docs").status_code == 404
