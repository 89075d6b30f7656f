"""The client: against the real service, and against a scripted one for what seldom happens."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import stamina
from PIL import Image

from rlfseg.cli import main
from rlfseg.client import Client
from rlfseg.errors import BadSample, ServiceError
from rlfseg.segmenter import Segmenter
from tests.serving.harness import Service, phrases_of, png, scene


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    with stamina.set_testing(True, attempts=4, cap=True):
        yield


def scripted(*replies: httpx.Response | Exception, retries: int = 5) -> tuple[Client, list[httpx.Request]]:
    """A client of a service that gives these replies, and what it was asked."""
    left, seen = list(replies), []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        reply = left.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    client = Client("http://service", key="k", retries=retries)
    client.http = httpx.Client(base_url="http://service", transport=httpx.MockTransport(answer))
    return client, seen


BUSY = {"error": {"kind": "overloaded", "message": "too many pictures are waiting"}, "request_id": "1"}


def ok() -> httpx.Response:
    return httpx.Response(200, json={"models": [{"name": "tiny"}]})


@pytest.mark.parametrize(
    "trouble", [httpx.Response(503, json=BUSY), httpx.Response(429), httpx.ConnectError("refused"), httpx.Response(502)]
)
def test_a_busy_service_is_asked_again(trouble: Any) -> None:
    client, seen = scripted(trouble, ok())
    assert client.models() == [{"name": "tiny"}]
    assert len(seen) == 2


def test_it_waits_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    stamina.set_testing(False)
    busy = [httpx.Response(503, json=BUSY, headers={"Retry-After": s}) for s in ("7", "100000", "soon")]
    client, seen = scripted(*busy, ok())
    assert client.models()
    assert waits[:2] == [7, 60]  # never longer than a minute
    assert waits[2] < 7  # what can't be read counts as nothing
    assert len(seen) == 4


def told(kind: str) -> httpx.Response:
    return httpx.Response(503, json={"error": {"kind": kind, "message": "because"}, "request_id": "1"})


OF_OTHERS = [  # a load balancer's
    httpx.Response(502),
    httpx.Response(503, text="no backend"),
    httpx.Response(503, json={"error": "no backend"}),
    httpx.Response(503, json=["overloaded"]),
    httpx.Response(429, headers={"Retry-After": "1"}),
]


@pytest.mark.parametrize("trouble", [told("lost"), told("failed"), *OF_OTHERS])
@pytest.mark.parametrize("path", ["/v1/batches", "v1/batches/"])
def test_a_batch_that_may_have_begun_is_not_begun_again(trouble: httpx.Response, path: str) -> None:
    client, seen = scripted(trouble, ok())
    with pytest.raises(ServiceError, match=str(trouble.status_code)):
        client.request("post", path, json={})
    assert len(seen) == 1


@pytest.mark.parametrize("kind", ["overloaded", "starting", "stopping", "short"])
def test_a_batch_that_was_not_begun_is_asked_for_again(kind: str) -> None:
    client, seen = scripted(told(kind), ok())
    client.request("POST", "/v1/batches", json={})
    assert len(seen) == 2


@pytest.mark.parametrize("trouble", [told("lost"), told("overloaded"), *OF_OTHERS])
@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/batches"), ("GET", "/v1/models"), ("POST", "/v1/segment")])
def test_what_begins_nothing_is_asked_for_again(trouble: httpx.Response, method: str, path: str) -> None:
    client, seen = scripted(trouble, ok())
    client.request(method, path)
    assert len(seen) == 2


def test_a_service_that_stays_busy_is_an_error_of_one_line() -> None:
    client, seen = scripted(*[httpx.Response(503, json=BUSY)] * 3, retries=2)
    with pytest.raises(ServiceError, match="503: too many pictures are waiting"):
        client.models()
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (httpx.Response(401, json={"error": {"kind": "unauthorized", "message": "give a key"}}), "401: give a key"),
        (httpx.Response(500, text="Internal Server Error"), "500: Internal Server Error"),
        (httpx.ReadTimeout("slow"), "ReadTimeout: slow"),
    ],
)
def test_other_trouble_is_told_at_once(reply: Any, message: str) -> None:
    client, seen = scripted(reply)
    with pytest.raises(ServiceError, match=message):
        client.models()
    assert len(seen) == 1


def test_segment(service: Service, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(scene(0)))
    with Client(service.url, key=service.key) as client:
        assert [m["name"] for m in client.models()] == ["tiny", "other"]
        first, second = client.segment([tmp_path / "a.png", b"no picture"], [*phrases_of(0)[:1], " "], threshold=0.4)
        with pytest.raises(BadSample, match=r"none\.png"):
            client.segment(["none.png"], ["red ring"])
        [alone] = client.segment([b"no picture"], ["red ring"])
    assert (first.name, first.error, first.kind, first.model.split()[0]) == ("a.png", None, None, "tiny")
    for refused in (alone, second):
        assert refused.error
        assert refused.kind == "picture"
    good, empty = first.phrases
    assert good.mask.shape == (64, 64)
    assert good.mask.sum() == good.area
    with pytest.raises(BadSample, match="empty"):
        _ = empty.mask
    with Client(service.url, key="wrong") as stranger, pytest.raises(ServiceError, match="401"):
        stranger.models()


def test_the_command_writes_the_same_files_here_and_by_a_service(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, phrases = tmp_path / "a.png", phrases_of(0)[:2]
    picture.write_bytes(png(scene(0)))
    monkeypatch.setenv("RLFSEG_API_KEY", service.key)
    assert main("segment", [str(picture), *phrases, f"--out={tmp_path / 'here'}", "--device=cpu"]) == 0
    assert main("segment", [str(picture), *phrases, f"--out={tmp_path / 'there'}", f"--url={service.url}"]) == 0
    names = [f"a-{n:02d}.png" for n in range(len(phrases))]
    for place in ("here", "there"):
        assert sorted(p.name for p in (tmp_path / place).iterdir()) == [*names, "a-overlay.png"]
    expected = Segmenter.load("tiny", device="cpu")(picture, phrases)
    for name, result in zip(names, expected, strict=True):
        for place in ("here", "there"):
            mask = np.asarray(Image.open(tmp_path / place / name))
            doubtful = np.abs(result.score - result.threshold) < 1e-3
            assert ((mask == result.mask * 255) | doubtful).all()
    assert phrases[0] in capsys.readouterr().out
    monkeypatch.setenv("RLFSEG_API_KEY", "wrong")
    assert main("segment", [str(picture), "a", f"--out={tmp_path}", f"--url={service.url}"]) == 1
    assert "401" in capsys.readouterr().err


def test_the_client_loads_no_networks() -> None:
    code = (
        "import sys, rlfseg.client; print(json.dumps([m for m in ('torch', 'ray', 'diffusers') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
