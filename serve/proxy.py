"""What the service adds to Serve's HTTP proxy, which stands before all fronts.

- A request that a front takes with it when it dies, or that no front has room for, is answered in the service's own
  words, so that its client knows to ask again. By itself the proxy answers plain text, or ends without an answer, of
  which its HTTP server makes a bare 500.
- A client's request id is checked before it gets into logs.
- Headers by which a caller steers Serve are dropped: they are none of a client's business.

The proxy takes middleware from the function that $RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names where Ray is started:
`serve.proxy.middlewares`.
"""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlfseg.config import LimitsConfig
from serve.guard import problem, request_id
from serve.refusal import Refusal

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
LOST = "the process that worked on this request died; ask again"
OF_SERVE = {
    503: ("overloaded", "too many requests are waiting; ask again later"),
    408: ("deadline", "the request was not answered in time"),
}
STEERING = (
    b"x-request-disconnect-disabled",
    b"x-request-timeout-seconds",
    b"serve-multiplexed-model-id",
    b"x-session-id",
)
ROUTING = b"x-serve-router-"


def middlewares() -> list[Middleware]:
    """For Serve's proxy."""
    return [Middleware(Answered)]


class Answered:
    """ASGI middleware around Serve's proxy.

    Args:
        app: Serve's proxy.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, and answers it where nobody else did."""
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Serve's own health checks
            await self.app(scope, receive, send)
            return
        scope = {**scope, "headers": [(name, value) for name, value in scope["headers"] if not _steers(name)]}
        headers = MutableHeaders(scope=scope)
        headers["x-request-id"] = request_id(headers)
        passed = _Passed(send)
        await self.app(scope, receive, passed)
        if passed.refusal is not None:
            reply = problem(passed.refusal, headers["x-request-id"], passed.retry_after_s)
            reply.headers["x-request-id"] = headers["x-request-id"]
            await reply(scope, receive, send)


class _Passed:
    """`send` that holds back what Serve itself answers."""

    def __init__(self, send: Send):
        self.send, self.retry_after_s = send, LimitsConfig().retry_after_s
        self.refusal: Refusal | None = Refusal("lost", LOST)

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            status, headers = message["status"], Headers(raw=message["headers"])
            self.refusal = None
            if status in OF_SERVE and headers.get("content-type", "").startswith("text/plain"):
                self.refusal = Refusal(*OF_SERVE[status])
                self.retry_after_s = int(headers.get("retry-after", self.retry_after_s))
        if self.refusal is None:
            await self.send(message)


def _steers(name: bytes) -> bool:
    plain = name.lower().replace(b"_", b"-")  # as Serve compares them
    return plain in STEERING or plain.startswith(ROUTING)
