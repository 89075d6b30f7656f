"""The gate: host, API key, media type and size are checked before anything of a request's body is read."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlfseg.config import ServeConfig
from rlfseg.errors import ConfigError
from serve.meters import Meters
from serve.refusal import Refusal
from serve.schema import Fault, Problem

log = logging.getLogger("ray.serve")
HEALTH = ("/healthz", "/readyz")  # load balancers ask by address and without a key
JSON, FORM = "application/json", "multipart/form-data"
ID = re.compile("[A-Za-z0-9._-]{1,128}")
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


class Door:
    """Counts the requests inside; once it closes, nobody comes in any more."""

    def __init__(self) -> None:
        self.inside, self.open = 0, True

    async def close(self) -> None:
        """Returns when the last request is answered."""
        self.open = False
        while self.inside:
            await asyncio.sleep(0.05)


class Guard:
    """ASGI middleware around the whole API.

    Args:
        app: What to guard.
        config: Settings of the service.
        keys: Valid keys; None: all may ask.
        meters: Counts what is refused here.
        door: Counts who is inside.
    """

    def __init__(self, app: ASGIApp, *, config: ServeConfig, keys: Keys | None, meters: Meters, door: Door):
        self.app, self.config, self.keys, self.meters, self.door = app, config, keys, meters, door
        self.most_bytes = int(config.limits.body_mb * MIB)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers it with a problem."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        headers["x-request-id"] = request_id(headers)  # the same one wherever it is asked for
        try:
            self._check(scope["method"], scope["path"].removeprefix(scope.get("root_path", "")), headers)
        except Refusal as refusal:
            self.meters.error(refusal.kind)
            await problem(refusal, request_id(headers), self.config.limits.retry_after_s)(scope, receive, send)
            return
        self.door.inside += 1
        try:
            await self.app(scope, _Counted(receive, self.most_bytes), send)
        finally:
            self.door.inside -= 1

    def _check(self, method: str, path: str, headers: Headers) -> None:
        if not self.door.open and path != "/healthz":
            raise Refusal("stopping", "the service is being stopped")
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
        if _is_of_another_site(headers):
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
    """The id that a request came with, if it may stand in logs, else a new one; it is in the logs and in the answer."""
    given = headers.get("x-request-id", "")
    return given if ID.fullmatch(given) else uuid.uuid4().hex


def _given_key(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _is_of_another_site(headers: Headers) -> bool:
    """Whether a page of another site asks: browsers say so, or older ones the page's origin."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        return site not in ("none", "same-origin")
    return origin is not None and origin.partition("://")[2] != headers.get("host")


def _is_allowed(host: str, names: Iterable[str]) -> bool:
    # "[::1]:8000" -> "::1", "a.org:80" -> "a.org"
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return "*" in names or name.lower() in {n.lower() for n in names}


def _too_many_bytes(most: int) -> Refusal:
    return Refusal("too_large", f"the request is larger than {most / MIB:g} MiB (setting limits.body_mb)")
