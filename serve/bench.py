"""How fast the service is, and how it behaves when it is asked too much: rows for `rlfseg bench`.

Clients are threads of this process, each with a connection of its own; pictures differ and latents are not kept, so
that every request costs the same. Ours and its baseline run one after the other on the same Ray.
"""

from __future__ import annotations

import base64
import dataclasses
import http.client
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image
from ray import serve

from rlfseg.config import LimitsConfig, ServeConfig
from rlfseg.errors import ServiceError
from rlfseg.segmenter import Segmenter
from serve.app import NAME, build

CLIENTS = (1, 4, 16, 64)
PHRASES = ["red ring"]
PICTURES = 64
HEADERS = {"Content-Type": "application/json"}
Row = dict[str, Any]


@dataclasses.dataclass(kw_only=True)
class Load:
    """What clients saw.

    Attributes:
        statuses: Answers by HTTP status; 0: the connection broke.
        latencies: Seconds of each answer with status 200.
        batches: Pictures that went through the network with each of these.
        seconds: How long clients asked.
    """

    statuses: Counter[int] = dataclasses.field(default_factory=Counter)
    latencies: list[float] = dataclasses.field(default_factory=list)
    batches: list[int] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def per_second(self) -> float:
        """Answers with status 200 a second."""
        return self.statuses[200] / self.seconds

    def percentile(self, share: float) -> float:
        """Milliseconds within which this share, 0 to 100, was answered."""
        return float(np.percentile(self.latencies, share)) * 1000 if self.latencies else float("nan")

    @property
    def fill(self) -> float:
        """Mean pictures a batch, as a picture sees it."""
        return float(np.mean(self.batches)) if self.batches else float("nan")


def rows(config: ServeConfig, *, seconds: float = 10.0) -> list[Row]:
    """Starts the service three times and measures it.

    Args:
        config: Settings of the service; on loopback and without a key.
        seconds: Of each measurement.

    Returns:
        Rows `name`, `ours`, `baseline`, `ratio`, `goal`, `unit`; a ratio is the better the larger it is.
    """
    config = dataclasses.replace(config, auth="off", cache_mb=0.0)
    bodies = [_body(n) for n in range(PICTURES)]
    with running(config) as port:
        ours = {n: load(port, bodies, clients=n, seconds=seconds) for n in CLIENTS}
    with running(dataclasses.replace(config, batch_size=1)) as port:
        single = {n: load(port, bodies, clients=n, seconds=seconds) for n in CLIENTS}
    found: list[Row] = []
    for n in CLIENTS:
        found += _speed(f"{n} clients", ours[n], single[n], goal=_goal(config, n))
    found.append(_overhead(config, ours[1], seconds))
    few = LimitsConfig(requests=config.batch_size, queue=config.batch_size)
    with running(dataclasses.replace(config, limits=few)) as port:
        before = load(port, bodies, clients=1, seconds=seconds)
        flood = load(port, bodies, clients=8 * config.batch_size, seconds=seconds)
        after = load(port, bodies, clients=1, seconds=seconds)
    return found + _overload(before, flood, after)


@contextmanager
def running(config: ServeConfig) -> Iterator[int]:
    """The service on the Ray of this process; gives its port, and deletes it afterwards."""
    serve.start(http_options={"host": config.host, "port": config.port})
    serve.run(build(config), name=NAME)
    try:
        yield config.port
    finally:
        serve.delete(NAME)


def load(port: int, bodies: Sequence[bytes], *, clients: int, seconds: float) -> Load:
    """Clients that ask again as soon as they have an answer.

    Args:
        port: Of a service on this machine.
        bodies: Requests, taken in turn.
        clients: How many at a time.
        seconds: How long.

    Returns:
        What they saw; the first answer of each is left out, as its connection is new.
    """
    found, lock, stop = Load(), threading.Lock(), threading.Event()
    threads = [threading.Thread(target=_client, args=[port, bodies, n, found, lock, stop]) for n in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    stop.wait(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    found.seconds = time.perf_counter() - start
    return found


def _client(
    port: int, bodies: Sequence[bytes], first: int, found: Load, lock: threading.Lock, stop: threading.Event
) -> None:
    connection, n = http.client.HTTPConnection("127.0.0.1", port, timeout=120), first
    while not stop.is_set():
        n += 1
        start = time.perf_counter()
        try:
            connection.request("POST", "/v1/segment", bodies[n % len(bodies)], HEADERS)
            reply = connection.getresponse()
            status, text = reply.status, reply.read()
        except (OSError, http.client.HTTPException):
            status, text = 0, b""
            connection.close()
        took = time.perf_counter() - start
        with lock:
            found.statuses[status] += 1
            if status == 200:
                found.latencies.append(took)
                found.batches.append(json.loads(text)["images"][0]["batch"])
    connection.close()


def _speed(name: str, ours: Load, single: Load, *, goal: float | None) -> list[Row]:
    good = ours.statuses[200] / max(1, sum(ours.statuses.values()))
    found = [_row(f"{name}: requests", ours.per_second, single.per_second, goal=goal, unit="1/s")]
    for share in (50, 95, 99):
        mine, other = ours.percentile(share), single.percentile(share)
        found.append(_row(f"{name}: p{share}", mine, other, ratio=other / mine, unit="ms"))
    found.append(_row(f"{name}: pictures a batch", ours.fill, single.fill, unit=""))
    found.append(_row(f"{name}: answered", 100 * good, 100, goal=1.0, unit="%"))
    return found


def _goal(config: ServeConfig, clients: int) -> float | None:
    """At 16 clients twice as many on a GPU, never fewer on a CPU."""
    if clients != 16:
        return None
    return 2.0 if config.gpus else 1.0


def _overhead(config: ServeConfig, one: Load, seconds: float) -> Row:
    """A request of one client against the same call in this process."""
    segmenter = Segmenter.load(next(iter(config.models.values())), device=config.device, fast=config.fast)
    pictures = [np.asarray(_picture(n)) for n in range(PICTURES)]
    segmenter(pictures[0], PHRASES)
    took, until, n = [], time.perf_counter() + seconds, 0
    while time.perf_counter() < until:
        start, n = time.perf_counter(), n + 1
        segmenter(pictures[n % PICTURES], PHRASES)
        took.append(time.perf_counter() - start)
    here = float(np.percentile(took, 50)) * 1000
    return _row(
        "1 client: p50 against a call in process", one.percentile(50), here, ratio=here / one.percentile(50), unit="ms"
    )


def _overload(before: Load, flood: Load, after: Load) -> list[Row]:
    other = sum(n for status, n in flood.statuses.items() if status not in (200, 503))
    if not flood.statuses[200]:
        raise ServiceError(f"under overload nothing was answered: {dict(flood.statuses)}")
    refused = flood.statuses[503]
    return [
        _row("overload: answers that are neither 200 nor 503", other, 0, ratio=float(other == 0), goal=1.0, unit=""),
        _row("overload: requests", flood.per_second, before.per_second, unit="1/s"),
        _row("overload: refused with 503", refused / flood.seconds, 0, ratio=float(refused > 0), goal=1.0, unit="1/s"),
        _row(
            "overload: p50 of one client afterwards, against before",
            after.percentile(50),
            before.percentile(50),
            ratio=before.percentile(50) / after.percentile(50),
            goal=0.8,
            unit="ms",
        ),
    ]


def _row(
    name: str, ours: float, baseline: float, *, unit: str, ratio: float | None = None, goal: float | None = None
) -> Row:
    return {
        "name": f"serve, {name}",
        "ours": ours,
        "baseline": baseline,
        "ratio": (ours / baseline if baseline else float("nan")) if ratio is None else ratio,
        "goal": goal,
        "unit": unit,
    }


def _body(n: int) -> bytes:
    buffer = io.BytesIO()
    _picture(n).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return json.dumps({"images": [{"data": data}], "phrases": PHRASES}).encode()


def _picture(n: int) -> Image.Image:
    """A grey gradient with a coloured square, a different one each: what is on it costs nothing."""
    side = 512
    pixels = np.broadcast_to(np.linspace(0, 255, side, dtype=np.uint8)[:, None, None], (side, side, 3)).copy()
    pixels[n : n + 100, 2 * n : 2 * n + 100] = (200, n, 40)
    return Image.fromarray(pixels)
