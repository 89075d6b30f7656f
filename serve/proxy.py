"""What a client hears when a front dies with its request: 503 in the service's own words, so that it asks again.

Serve's proxy ends such a request without an answer, of which its HTTP server makes a bare 500. The proxy takes
middleware from the function that $RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names where Ray is started:
`serve.proxy.middlewares`.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlfseg.config import LimitsConfig
from serve.guard import problem, request_id
from serve.refusal import Refusal

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
LOST = "the process that worked on this request died; ask again"


def middlewares() -> list[Middleware]:
    """For Serve's proxy."""
    return [Middleware(Answered)]


class Answered:
    """ASGI middleware: a request that ended without an answer gets one.

    Args:
        app: Serve's proxy.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on."""
        answered = scope["type"] != "http"

        async def noted(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        await self.app(scope, receive, noted)
        if not answered:
            lost = problem(Refusal("lost", LOST), request_id(Headers(scope=scope)), LimitsConfig().retry_after_s)
            await lost(scope, receive, send)
