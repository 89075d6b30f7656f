"""What is answered in place of a front that died, without Serve; the drills kill a real one."""

from __future__ import annotations

import asyncio

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.proxy import middlewares


async def silent(scope: Scope, receive: Receive, send: Send) -> None:
    """As Serve's proxy where the replica died."""


async def broken(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 500, "headers": []})
    await send({"type": "http.response.body", "body": b"ours"})


def asked(app: ASGIApp) -> httpx.Response:
    [middleware] = middlewares()
    wrapped = middleware.cls(app, *middleware.args, **middleware.kwargs)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(wrapped), base_url="http://service") as http:
            return await http.post("/v1/segment", headers={"X-Request-ID": "seven"})

    return asyncio.run(ask())


def test_a_request_that_ended_without_an_answer_may_be_asked_again() -> None:
    reply = asked(silent)
    assert reply.status_code == 503
    assert int(reply.headers["retry-after"]) > 0
    assert reply.json()["error"]["kind"] == "lost"
    assert reply.json()["request_id"] == "seven"


def test_answers_pass_as_they_are() -> None:
    reply = asked(broken)
    assert (reply.status_code, reply.text) == (500, "ours")
