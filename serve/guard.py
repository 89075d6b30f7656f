"""The gate: host, API key, media type and size are checked before anything of a request's body is read."""

from __future__ import annotations

import hashlib
import hmac
import logging
import uuid
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlfseg.config import ServeConfig
from rlfseg.errors import ConfigError
from serve.refusal import Refusal
from serve.schema import Fault, Problem

log = logging.getLogger("ray.serve")
HEALTH = ("/healthz", "/readyz")  # load balancers ask by address and without a key
JSON, FORM = "application/json", "multipart/form-data"
MIB = 2**20


class Keys:
    """API keys of a file, a line each; read again when the file changes, so that keys can be changed in work.

    Args:
        path: The file.

    Raises:
        ConfigError: It can't be read or holds no key.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        self.digests: list[bytes] = []
        self.changed = self._changed()
        self._read()

    def know(self, given: str) -> bool:
        """Whether `given` is one of the keys; takes the same time whichever it is, and whether it is one."""
        if (changed := self._changed()) != self.changed:
            self.changed = changed
            try:
                self._read()
            except ConfigError as error:
                log.error("%s; the keys known so far stay valid", error)
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        return bool(sum([hmac.compare_digest(digest, known) for known in self.digests]))  # a list: all are compared

    def _changed(self) -> int:
        try:
            return self.path.stat().st_mtime_ns
        except OSError:
            return 0

    def _read(self) -> None:
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"keys_file: {self.path} can't be read: {type(error).__name__}") from None
        keys = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
        if not keys:
            raise ConfigError(f"keys_file: {self.path} holds no key; write one a line, or set auth=off")
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]


class Guard:
    """ASGI middleware around the whole API.

    Args:
        app: What to guard.
        config: Settings of the service.
        keys: Valid keys; None: all may ask.
    """

    def __init__(self, app: ASGIApp, *, config: ServeConfig, keys: Keys | None):
        self.app, self.config, self.keys = app, config, keys
        self.most_bytes = int(config.limits.body_mb * MIB)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers it with a problem."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check(scope["method"], scope["path"], headers)
        except Refusal as refusal:
            await problem(refusal, request_id(headers), self.config.limits.retry_after_s)(scope, receive, send)
            return
        await self.app(scope, _Counted(receive, self.most_bytes), send)

    def _check(self, method: str, path: str, headers: Headers) -> None:
        if path not in HEALTH:
            self._check_host(headers.get("host", ""))
            if path != "/" and not path.startswith("/page/"):  # the page: links of other sites may lead to it
                self._check_caller(headers)
        if method == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            taken = (JSON, FORM) if path == "/v1/segment" else (JSON,)
            if kind not in taken:
                raise Refusal("media_type", f"Content-Type: {kind[:100]!r}; send {' or '.join(taken)}")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.most_bytes:
            raise _too_many_bytes(self.most_bytes)

    def _check_caller(self, headers: Headers) -> None:
        if self.keys is not None and not self.keys.know(_given_key(headers)):
            raise Refusal("unauthorized", "give a valid API key: `Authorization: Bearer KEY` or `X-API-Key: KEY`")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise Refusal("host", "pages of other sites may not use this service")

    def _check_host(self, host: str) -> None:
        if not _is_allowed(host, self.config.hosts):
            raise Refusal("host", f"Host: {host[:100]!r} is not one of this service's names (setting `hosts`)")


class _Counted:
    """`receive` that stops at too many bytes, whatever Content-Length said."""

    def __init__(self, receive: Receive, most_bytes: int):
        self.receive, self.most_bytes, self.seen = receive, most_bytes, 0

    async def __call__(self) -> Message:
        message = await self.receive()
        self.seen += len(message.get("body", b""))
        if self.seen > self.most_bytes:
            raise _too_many_bytes(self.most_bytes)
        return message


def problem(refusal: Refusal, request: str, retry_after_s: int) -> JSONResponse:
    """A refusal as an HTTP answer.

    Args:
        refusal: Why there is no other answer.
        request: The request's id.
        retry_after_s: How long a client should wait after a 503.

    Returns:
        A `Problem` with the refusal's status.
    """
    headers = {}
    if refusal.status == 503:
        headers["Retry-After"] = str(retry_after_s)
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = Problem(error=Fault(kind=refusal.kind, message=refusal.message), request_id=request)
    return JSONResponse(body.model_dump(), refusal.status, headers)


def request_id(headers: Headers) -> str:
    """The id that Serve's proxy gave the request, or took from the client; it is in the logs and in every answer."""
    return headers.get("x-request-id") or uuid.uuid4().hex


def _given_key(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _is_allowed(host: str, names: Iterable[str]) -> bool:
    # "[::1]:8000" -> "::1", "a.org:80" -> "a.org"
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return "*" in names or name.lower() in {n.lower() for n in names}


def _too_many_bytes(most: int) -> Refusal:
    return Refusal("too_large", f"the request is larger than {most / MIB:g} MiB (setting limits.body_mb)")
