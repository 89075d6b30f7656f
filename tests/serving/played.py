"""The HTTP interface with a model that is played."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from fastapi import FastAPI
from starlette.types import ASGIApp

from rlfseg.config import LimitsConfig, ServeConfig
from serve.api import build_api
from serve.catalog import Catalog
from serve.guard import Keys
from serve.messages import Answer, Ask
from serve.meters import Meters
from serve.model import Engine, Loaded
from serve.refusal import Refusal
from serve.work import AskModel, Work
from tests.serving.harness import phrases_of, png, scene

IMAGE, PHRASES = png(scene(0)), phrases_of(0)
LIMITS = LimitsConfig(body_mb=0.05, phrases=4, images=3, deadline_s=5, pixels=5000)


class Counted(Meters):
    """Counts without Prometheus."""

    def __init__(self) -> None:
        self.errors: Counter[str] = Counter()
        self.pictures = 0

    def picture(self, timing: Any, *, cached: bool) -> None:
        self.pictures += 1

    def request(self, seconds: float) -> None:
        assert seconds >= 0

    def error(self, kind: str) -> None:
        self.errors[kind] += 1


async def is_ready() -> bool:
    return True


def shipped() -> AskModel:
    """The shipped model, one picture at a time."""
    engine, loaded = Engine(1), Loaded.load("tiny", device="cpu")

    async def answer(name: str, asked: Ask) -> Answer:
        [found] = engine([(loaded, asked)])
        if isinstance(found, Refusal):
            raise found
        return found

    return answer


def build(
    ask: AskModel,
    *,
    keys: Keys | None = None,
    ready: Callable[[], Awaitable[bool]] = is_ready,
    meters: Meters | None = None,
    **settings: Any,
) -> FastAPI:
    config = ServeConfig(**({"limits": LIMITS, "auth": False} | settings))
    catalog, meters = Catalog(config.models), meters or Counted()
    work = Work(config, catalog, ask, meters)
    return build_api(config, catalog=catalog, work=work, batches=None, keys=keys, ready=ready, meters=meters)


def call(api: ASGIApp, method: str, path: str, **kwargs: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **kwargs)

    return asyncio.run(go())


def kind(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["kind"]
