"""On a Ray that runs already, with somebody else's application on its Serve: we come and go, and that stays."""

from __future__ import annotations

import http.client
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from ray import serve
from starlette.requests import Request

from rlfseg.config import BenchConfig
from rlfseg.errors import ServiceError
from serve.app import NAME
from serve.bench import measure
from tests.serving.harness import COMMAND, free_port, png, scene, started

pytestmark = pytest.mark.timeout(300)


async def neighbour(request: Request) -> str:
    return "still here"


@pytest.fixture(scope="module")
def port(ray: ModuleType) -> Iterator[int]:
    """Where Serve listens."""
    number = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": number})
    serve.run(serve.deployment(neighbour).bind(), name="neighbour", route_prefix="/neighbour")
    yield number
    serve.shutdown()


@pytest.fixture(autouse=True)
def _joined(port: int, ray: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is started joins this Ray; afterwards the neighbour is there, and nothing else."""
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    yield
    assert httpx.get(f"http://127.0.0.1:{port}/neighbour").text == "still here"
    assert set(serve.status().applications) == {"neighbour"}


def test_it_does_not_listen_where_it_believes(root: Path, port: int) -> None:
    command = [*COMMAND, f"--port={free_port()}", "--device=cpu"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert f"Serve runs here already at 127.0.0.1:{port}" in done.stderr.splitlines()[-1]


def test_it_comes_and_goes(tmp_path: Path, root: Path, port: int) -> None:
    settings = {"device": "cpu", "port": port, "limits": {"deadline_s": 3}}
    with started(tmp_path, root, settings) as service:
        assert service.segment([png(scene(0))], ["red ring"]).status_code == 200
        # There is neither a dashboard nor its file of addresses
        assert any(name.startswith("ray_") for name in service.metrics())
        late = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        late.putrequest("POST", "/v1/segment")
        for header in (("Content-Type", "application/json"), ("Content-Length", "100")):
            late.putheader(*header)
        late.endheaders(b"{")  # and never more
        reply = late.getresponse()
        assert (reply.status, b"deadline" in reply.read()) == (504, True)
        late.close()


def test_serve_run(root: Path, port: int) -> None:
    command = [str(Path(sys.executable).with_name("serve")), "run", "--non-blocking", "serve.app:app"]
    command += ["auth=off", "device=cpu", "limits.phrases=3"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        until = time.monotonic() + 60
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < until
            time.sleep(0.2)
        assert client.get("/v1/models").json()["limits"]["phrases"] == 3
        files = {"images": ("a.png", png(scene(0)))}
        assert client.post("/v1/segment", files=files, data={"phrases": "red ring"}).status_code == 200
    serve.delete("default")


def test_the_bench_keeps_away() -> None:
    with pytest.raises(ServiceError, match="Serve runs on this Ray already"):
        measure(BenchConfig(what=("serve",)))
    assert NAME not in serve.status().applications
