"""The bench of the service: what its clients count, and its rows."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType
from typing import ClassVar

import pytest

from rlfseg.config import BenchConfig, ServeConfig
from rlfseg.errors import ServiceError
from serve import bench
from serve.bench import Load, load, measure
from tests.serving.harness import free_port


class Answers(BaseHTTPRequestHandler):
    """The first answer of a connection is 500; then 200 and 503 in turn."""

    protocol_version = "HTTP/1.1"
    statuses: ClassVar[Counter[int]] = Counter()
    paths: ClassVar[set[str]] = set()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.served = getattr(self, "served", -1) + 1
        status = 500 if self.served == 0 else (503, 200)[self.served % 2]
        self.statuses[status] += 1
        self.paths.add(self.path)
        text = json.dumps({"images": [{"batch": 3}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def answering() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_clients_count_everything_but_their_first_answer(answering: int) -> None:
    seen = load(answering, [b"{}"], clients=3, seconds=0.5)
    assert Answers.statuses.pop(500) == 3
    assert seen.statuses == Answers.statuses
    assert seen.statuses.keys() == {200, 503}
    assert len(seen.latencies) == len(seen.batches) == seen.statuses[200]
    assert (seen.fill, Answers.paths) == (3, {"/bench/v1/segment"})
    assert seen.per_second == pytest.approx(seen.statuses[200] / seen.seconds)


def test_a_broken_connection_is_counted() -> None:
    seen = load(free_port(), [b"{}"], clients=1, seconds=0.2)
    assert seen.statuses.keys() == {0}


def test_errors_stand_in_rows_by_status() -> None:
    fine = Load(statuses=Counter({200: 10}), latencies=[0.1] * 10, batches=[1] * 10, seconds=2)
    flood = Load(statuses=Counter({200: 4, 503: 5, 500: 2, 0: 1}), latencies=[0.2] * 4, batches=[2] * 4, seconds=2)
    rows = {row.name: row for row in bench._overload(fine, flood, fine)}
    assert {n: rows[f"overload: {n}"].ours for n in ("status 503", "status 500", "broken connections")} == {
        "status 503": 5,
        "status 500": 2,
        "broken connections": 1,
    }
    assert rows["overload: neither 200 nor 503"].verdict == "missed"
    answered = next(row for row in bench._speed("8 clients", flood, fine, goal=None) if "answered" in row.name)
    assert answered.ours == pytest.approx(100 * 4 / 12)
    with pytest.raises(ServiceError, match="nothing was answered"):
        bench._overload(fine, Load(statuses=Counter({503: 3}), seconds=1), fine)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_it_runs(ray: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CLIENTS", (1, 4))
    rows = {row.name: row for row in measure(BenchConfig(what=("serve",), seconds=0.5, serve=_small()))}
    assert rows["4 clients: answered"].ours == rows["1 clients: answered"].ours == 100
    assert rows["overload: neither 200 nor 503"].ours == 0


def _small() -> ServeConfig:
    return ServeConfig(device="cpu", port=free_port(), batch_size=2)
