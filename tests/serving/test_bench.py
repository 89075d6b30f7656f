"""The bench of the service: what its clients count, and its rows."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from rlfseg.config import ASSETS, BenchConfig, ServeConfig
from rlfseg.datasets.shapes import draw_scene
from rlfseg.errors import ServiceError
from rlfseg.pipeline import random_models
from rlfseg.segmenter import Segmenter
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


def test_on_a_gpu_a_large_model_is_served_unless_one_is_named(
    ray: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[ServeConfig] = []
    monkeypatch.setattr(bench, "resolved", lambda config: replace(config, gpus=1.0))
    monkeypatch.setattr(bench, "_measured", lambda config, seconds: served.append(config) or [])
    monkeypatch.setattr(random_models, "write_base", lambda folder: shutil.copytree(ASSETS / "base", folder))
    monkeypatch.setattr(random_models, "write_adapter", partial(_write_small, random_models.write_adapter))
    for models, name in (({"tiny": "tiny"}, "sd"), ({"mine": "tiny"}, "mine")):
        measure(BenchConfig(what=("serve",), out=str(tmp_path), serve=ServeConfig(models=models)))
        assert list(served[-1].models) == [name]


def _write_small(write: Callable[..., None], folder: Path, *, base: Path, resolution: int) -> None:
    """What was written loads, and its LoRA changes the masks."""
    assert resolution == 512
    write(folder, base=base, resolution=64)
    picture = draw_scene(0, split="test").image
    changed, plain = (Segmenter.load(str(folder), device="cpu", base_only=only) for only in (False, True))
    assert (changed(picture, ["star"])[0].score != plain(picture, ["star"])[0].score).any()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_it_runs(ray: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CLIENTS", (1, 4))
    config = BenchConfig(what=("serve",), out=str(tmp_path), seconds=0.5, serve=_small())
    rows = {row.name: row for row in measure(config)}
    assert rows["4 clients: answered"].ours == rows["1 clients: answered"].ours == 100
    assert rows["overload: neither 200 nor 503"].ours == 0


def _small() -> ServeConfig:
    return ServeConfig(device="cpu", port=free_port(), batch_size=2)
