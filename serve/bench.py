"""How fast the service is, and how it behaves when it is asked too much: rows for `rlfseg bench`.

Clients are threads of this process, each with a connection of its own; pictures differ and latents are not kept, so
that every request costs the same. Ours and its baseline run one after the other on the same Ray. On a GPU the model is
of SD v1.5's size with random weights, unless the settings name another: the shipped one would leave the GPU idle.
"""

from __future__ import annotations

import base64
import dataclasses
import http.client
import io
import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from ray import serve
from ray.serve.context import _get_global_client

from rlfseg import images
from rlfseg.config import BenchConfig, LimitsConfig, ServeConfig
from rlfseg.errors import ServiceError
from rlfseg.pipeline import random_models
from rlfseg.pipeline.bench import Row
from rlfseg.pipeline.cluster import connect
from rlfseg.segmenter import Segmenter
from serve.app import build, resolved

NAME, ROUTE = "rlfseg-bench", "/bench"  # never in the way of a service
CLIENTS = (1, 4, 16, 64)
PHRASES = ["red ring"]
PICTURES = 64
PAUSE_S = 0.05  # of a client after a 503
HEADERS = {"Content-Type": "application/json"}


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


def measure(config: BenchConfig) -> list[Row]:
    """Starts the service three times and measures it.

    Args:
        config: Settings of the command: those of the service, and the seconds of each measurement.

    Returns:
        Rows; a ratio is the better the larger it is.

    Raises:
        ServiceError: Serve runs on this Ray already, or nothing is answered.
    """
    connect()
    if _get_global_client(raise_if_no_controller_running=False) is not None:
        raise ServiceError("Serve runs on this Ray already, and is left alone: measure on another one")
    ours = resolved(dataclasses.replace(config.serve, auth=False, host="127.0.0.1", cache_mb=0.0))
    with tempfile.TemporaryDirectory(dir=config.out, prefix="serve-") as made:
        if ours.gpus and ours.models == ServeConfig().models and not config.quick:
            random_models.write_base(Path(made) / "base")
            random_models.write_adapter(Path(made) / "adapter", base=Path(made) / "base", resolution=512)
            ours = dataclasses.replace(ours, models={"sd": str(Path(made, "adapter").absolute())})
        try:
            return _measured(ours, config.seconds)
        finally:
            serve.shutdown()


def _measured(ours: ServeConfig, seconds: float) -> list[Row]:
    bodies = [_body(n) for n in range(PICTURES)]
    with running(ours) as port:
        batched = {n: load(port, bodies, clients=n, seconds=seconds) for n in CLIENTS}
    with running(dataclasses.replace(ours, batch_size=1)) as port:
        single = {n: load(port, bodies, clients=n, seconds=seconds) for n in CLIENTS}
    few = LimitsConfig(requests=ours.batch_size, queue=ours.batch_size)
    with running(dataclasses.replace(ours, limits=few)) as port:
        before = load(port, bodies, clients=1, seconds=seconds)
        flood = load(port, bodies, clients=8 * ours.batch_size, seconds=seconds)
        after = load(port, bodies, clients=1, seconds=seconds)
    speeds = [row for n in CLIENTS for row in _speed(f"{n} clients", batched[n], single[n], goal=_goal(ours, n))]
    return [*speeds, _overhead(ours, batched[1], seconds), *_overload(before, flood, after)]


@contextmanager
def running(config: ServeConfig) -> Iterator[int]:
    """The service on the Ray of this process; gives its port, and deletes it afterwards."""
    serve.start(http_options={"host": config.host, "port": config.port})
    serve.run(build(config), name=NAME, route_prefix=ROUTE)
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
        What they saw; the first answer of each comes before the clock starts, as its connection is new.
    """
    found, lock, stop, begin = Load(), threading.Lock(), threading.Event(), threading.Barrier(clients + 1)
    threads = [
        threading.Thread(target=_client, args=[port, bodies, n, found, lock, stop, begin]) for n in range(clients)
    ]
    for thread in threads:
        thread.start()
    begin.wait()
    start = time.perf_counter()
    stop.wait(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    found.seconds = time.perf_counter() - start
    return found


def _client(
    port: int,
    bodies: Sequence[bytes],
    first: int,
    found: Load,
    lock: threading.Lock,
    stop: threading.Event,
    begin: threading.Barrier,
) -> None:
    connection, n = http.client.HTTPConnection("127.0.0.1", port, timeout=120), first
    _ask(connection, bodies[n % len(bodies)])
    begin.wait()
    while not stop.is_set():
        n += 1
        start = time.perf_counter()
        status, text = _ask(connection, bodies[n % len(bodies)])
        took = time.perf_counter() - start
        with lock:
            found.statuses[status] += 1
            if status == 200:
                found.latencies.append(took)
                found.batches.append(json.loads(text)["images"][0]["batch"])
        if status != 200:
            stop.wait(PAUSE_S)
    connection.close()


def _ask(connection: http.client.HTTPConnection, body: bytes) -> tuple[int, bytes]:
    """Status and body of the answer; 0 where the connection broke."""
    try:
        connection.request("POST", f"{ROUTE}/v1/segment", body, HEADERS)
        reply = connection.getresponse()
        return reply.status, reply.read()
    except (OSError, http.client.HTTPException):
        connection.close()
        return 0, b""


def _speed(name: str, ours: Load, single: Load, *, goal: float | None) -> list[Row]:
    """Against batches of one picture."""
    rate, alone = ours.per_second, single.per_second
    found = [Row(name=f"{name}: requests", ours=rate, baseline=alone, ratio=rate / alone, goal=goal, unit="1/s")]
    for share in (50, 95, 99):
        mine, other = ours.percentile(share), single.percentile(share)
        found.append(Row(name=f"{name}: p{share}", ours=mine, baseline=other, ratio=other / mine, goal=None, unit="ms"))
    good = ours.statuses[200] / sum(ours.statuses.values())
    found.append(Row(name=f"{name}: batch", ours=ours.fill, baseline=None, ratio=None, goal=None, unit="pictures"))
    found.append(Row(name=f"{name}: answered", ours=100 * good, baseline=None, ratio=good, goal=1.0, unit="%"))
    return found + _errors(name, ours)


def _errors(name: str, load: Load) -> list[Row]:
    """A row for each status but 200."""
    return [
        Row(
            name=f"{name}: {f'status {status}' if status else 'broken connections'}",
            ours=count,
            baseline=None,
            ratio=None,
            goal=None,
            unit="answers",
        )
        for status, count in sorted(load.statuses.items())
        if status != 200
    ]


def _goal(config: ServeConfig, clients: int) -> float | None:
    """At 16 clients twice as many on a GPU, never fewer on a CPU."""
    if clients != 16:
        return None
    return 2.0 if config.gpus else 1.0


def _overhead(config: ServeConfig, one: Load, seconds: float) -> Row:
    """A request of one client against the same call in this process, with as many threads as a replica has."""
    torch.set_num_threads(max(1, int(config.cpus)))
    segmenter = Segmenter.load(next(iter(config.models.values())), device=config.device, fast=config.fast)
    pictures = [_png(n) for n in range(PICTURES)]
    segmenter(pictures[0], PHRASES)
    took, until, n = [], time.perf_counter() + seconds, 0
    while time.perf_counter() < until:
        start, n = time.perf_counter(), n + 1
        images.rle_encode(segmenter(pictures[n % PICTURES], PHRASES)[0].mask)
        took.append(time.perf_counter() - start)
    here, there = float(np.percentile(took, 50)) * 1000, one.percentile(50)
    name = "1 client: p50, against the same call in process"
    return Row(name=name, ours=there, baseline=here, ratio=here / there, goal=None, unit="ms")


def _overload(before: Load, flood: Load, after: Load) -> list[Row]:
    """Nothing but 503 when it is asked too much, and the old latency afterwards."""
    if not flood.statuses[200]:
        raise ServiceError(f"under overload nothing was answered: {dict(flood.statuses)}")
    other = sum(n for status, n in flood.statuses.items() if status not in (200, 503))
    refused, fine = flood.statuses[503] / flood.seconds, float(other == 0)
    then, now = before.percentile(50), after.percentile(50)
    return [
        Row(name="overload: neither 200 nor 503", ours=other, baseline=None, ratio=fine, goal=1.0, unit="answers"),
        Row(name="overload: 503", ours=refused, baseline=None, ratio=None, goal=None, unit="1/s"),
        Row(name="overload: 200", ours=flood.per_second, baseline=None, ratio=None, goal=None, unit="1/s"),
        *_errors("overload", flood),
        Row(name="1 client after overload: p50", ours=now, baseline=then, ratio=then / now, goal=0.8, unit="ms"),
    ]


def _body(n: int) -> bytes:
    data = base64.b64encode(_png(n)).decode("ascii")
    return json.dumps({"images": [{"data": data}], "phrases": PHRASES}).encode()


def _png(n: int) -> bytes:
    """A grey gradient with a coloured square, a different one each: what is on it costs nothing."""
    side = 512
    pixels = np.broadcast_to(np.linspace(0, 255, side, dtype=np.uint8)[:, None, None], (side, side, 3)).copy()
    pixels[n : n + 100, 2 * n : 2 * n + 100] = (200, n, 40)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
