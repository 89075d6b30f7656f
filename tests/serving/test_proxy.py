"""What is added to Serve's proxy, without Serve; the drills kill a real front, and `test_service` floods one."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.proxy import middlewares


async def silent(scope: Scope, receive: Receive, send: Send) -> None:
    """As Serve's proxy where the replica died."""


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Says which headers came through."""
    names = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    await JSONResponse(names)(scope, receive, send)


def asked(app: ASGIApp, path: str = "/v1/segment", headers: dict[str, Any] | None = None) -> httpx.Response:
    [middleware] = middlewares()
    wrapped = middleware.cls(app, *middleware.args, **middleware.kwargs)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(wrapped), base_url="http://service") as http:
            return await http.post(path, headers=headers or {"X-Request-ID": "seven"})

    return asyncio.run(ask())


def test_a_request_that_ended_without_an_answer_may_be_asked_again() -> None:
    reply = asked(silent)
    assert reply.status_code == 503
    assert int(reply.headers["retry-after"]) > 0
    assert reply.json()["error"]["kind"] == "lost"
    assert reply.json()["request_id"] == reply.headers["x-request-id"] == "seven"


@pytest.mark.parametrize(
    ("answer", "status", "kind", "wait"),
    [
        (PlainTextResponse("Request dropped", 503, {"Retry-After": "7"}), 503, "overloaded", "7"),
        (PlainTextResponse("Deployment unavailable", 503), 503, "overloaded", "2"),
        (PlainTextResponse("Request seven timed out", 408), 504, "deadline", None),
    ],
)
def test_what_serve_answers_itself_is_said_in_our_words(
    answer: PlainTextResponse, status: int, kind: str, wait: str | None
) -> None:
    reply = asked(answer)
    assert (reply.status_code, reply.json()["error"]["kind"]) == (status, kind)
    assert reply.headers.get("retry-after") == wait
    assert reply.json()["request_id"] == "seven"


@pytest.mark.parametrize(
    "answer", [PlainTextResponse("ours", 500), JSONResponse({"error": "ours"}, 503, {"Retry-After": "9"})]
)
def test_answers_pass_as_they_are(answer: JSONResponse | PlainTextResponse) -> None:
    reply = asked(answer)
    assert (reply.status_code, reply.content) == (answer.status_code, answer.body)
    assert reply.headers == answer.headers


def test_streams_pass_part_by_part() -> None:
    parts: list[bytes] = []

    async def lines(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for n in range(3):
            await send({"type": "http.response.body", "body": b"%d\n" % n, "more_body": n < 2})
            parts.append(b"%d" % n)

    assert asked(lines).text == "0\n1\n2\n"
    assert parts == [b"0", b"1", b"2"]


def test_serves_own_health_check_is_left_alone() -> None:
    reply = asked(PlainTextResponse("DRAINING", 503), "/-/healthz")
    assert (reply.status_code, reply.text) == (503, "DRAINING")


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (b"ticket-4711", True),
        (b"A.b_c-" + b"9" * 122, True),
        (b"9" * 129, False),
        (b"", False),
        (b"caf\xc3\xa9", False),
        (b"\xff\xfe", False),
        (b"a b", False),
        (b"a\tb", False),
    ],
)
def test_ids_that_may_not_stand_in_logs_are_replaced(given: bytes, taken: bool) -> None:
    found = asked(echo, headers={"X-Request-ID": given}).json()["x-request-id"]
    if taken:
        assert found == given.decode()
    else:
        assert len(found) == 32
        int(found, 16)


def test_a_request_without_an_id_gets_one() -> None:
    first, second = (asked(echo, headers={"Accept": "*/*"}).json()["x-request-id"] for _ in range(2))
    assert len({first, second}) == 2


@pytest.mark.parametrize(
    "name",
    [
        "X-Request-Disconnect-Disabled",
        "X-Request-Timeout-Seconds",
        "serve_multiplexed_model_id",
        "Serve-Multiplexed-Model-Id",
        "X-Session-Id",
        "X-Serve-Router-Anything",
    ],
)
def test_clients_do_not_steer_serve(name: str) -> None:
    headers = asked(echo, headers={name: b"\xff1", "X-API-Key": "kept"}).json()
    assert headers["x-api-key"] == "kept"
    assert name.lower() not in headers
