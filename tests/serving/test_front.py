"""How a front sees its models, without Serve: when it is ready, and what becomes of Serve's errors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from rlfseg.config import SamplingConfig
from serve import front
from serve.front import ModelClient
from serve.messages import Answer, Ask
from serve.refusal import Refusal

ASK = Ask(request="r", key="k", square=np.zeros((3, 8, 8), np.float32), phrases=("a",), sampling=SamplingConfig())
ANSWER = Answer(squares=[], version="v", threshold=0.5, cached=False, batch=1, encode_ms=0, network_ms=0)
FULL, DEAD = BackPressureError(num_queued_requests=1, max_queued_requests=1), ActorDiedError()


class Response:
    """What a handle gives: to be awaited, or given up."""

    def __init__(self, result: Any):
        self.result, self.cancelled = result, False

    def __await__(self) -> Any:
        async def wait() -> Any:
            if self.result is None:
                await asyncio.sleep(60)
            if isinstance(self.result, Exception):
                raise self.result
            return self.result

        return wait().__await__()

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Of a model deployment: each call takes its next result; None: it keeps its caller waiting."""

    def __init__(self, *results: Any):
        self.results, self.given = list(results), list[Response]()

    def options(self, **_: object) -> Handle:
        return self

    @property
    def segment(self) -> Handle:
        return self

    ready = segment

    def remote(self, *_: object) -> Response:
        self.given.append(Response(self.results.pop(0)))
        return self.given[-1]


def run(*calls: Awaitable[Any]) -> list[Any]:
    async def all_of_them() -> list[Any]:
        return [await asyncio.gather(call, return_exceptions=True) for call in calls]

    return [result for [result] in asyncio.run(all_of_them())]


@pytest.fixture
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "PROBE_S", 0.05)


@pytest.mark.usefixtures("_hasty")
def test_it_is_not_ready_before_a_model_is() -> None:
    handle = Handle(None, DEAD, True)
    client = ModelClient(handle)  # type: ignore[arg-type]
    assert run(client.ready(), client.ready(), client.ready()) == [False, False, True]
    assert [given.cancelled for given in handle.given] == [True, True, False]


@pytest.mark.parametrize("first", [ANSWER, FULL])
def test_busy_is_ready(first: Any) -> None:
    client = ModelClient(Handle(first))  # type: ignore[arg-type]
    begin = client.ask("tiny", ASK) if first is ANSWER else client.ready()
    # No further call: a model that works on a large batch does not answer for long
    assert run(begin, client.ready(), client.ready())[1:] == [True, True]


def test_after_a_loss_a_model_has_to_answer_again() -> None:
    client = ModelClient(Handle(True, DEAD, DEAD, ANSWER))  # type: ignore[arg-type]
    first, lost, again, answer, now = run(
        client.ready(), client.ask("tiny", ASK), client.ready(), client.ask("tiny", ASK), client.ready()
    )
    assert (first, again, answer, now) == (True, False, ANSWER, True)
    assert isinstance(lost, Refusal)
    assert (lost.kind, lost.status) == ("lost", 503)


def test_a_full_queue_is_a_refusal() -> None:
    [full] = run(ModelClient(Handle(FULL)).ask("tiny", ASK))  # type: ignore[arg-type]
    assert isinstance(full, Refusal)
    assert full.kind == "overloaded"
