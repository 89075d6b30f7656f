"""The service when things go wrong or change under load: nobody's request is lost, and memory stays flat."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from tests.serving.harness import free_port, png, scene, started

pytestmark = [pytest.mark.drill, pytest.mark.timeout(1800)]
IMAGE = png(scene(0))


class Clients:
    """Clients that ask again as soon as they have an answer, until told to stop."""

    def __init__(self, url: str, clients: int, image: bytes = IMAGE):
        self.url, self.image = url, image
        self.seen: Counter[int] = Counter()
        self.stop, self.lock = threading.Event(), threading.Lock()
        self.threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def __enter__(self) -> Clients:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def _ask(self) -> None:
        with httpx.Client(base_url=self.url, timeout=120) as http:
            while not self.stop.is_set():
                reply = http.post("/v1/segment", files={"images": ("a.png", self.image)}, data={"phrases": "red ring"})
                with self.lock:
                    self.seen[reply.status_code] += 1

    def until(self, what: Callable[[], bool], seconds: float = 240) -> None:
        """Goes on asking until something is so."""
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, f"still not so after {seconds} s; answers so far: {dict(self.seen)}"
            time.sleep(0.2)


SETTINGS: dict[str, Any] = {"device": "cpu", "auth": False, "replicas": 2, "fronts": 2, "batch_size": 4, "cache_mb": 1}


@pytest.mark.parametrize("deployment", ["Model", "Front"])
def test_a_replica_killed_under_load_costs_only_its_own_requests(tmp_path: Path, root: Path, deployment: str) -> None:
    clients = 8
    with started(tmp_path, root, SETTINGS) as service, Clients(service.url, clients) as load:
        load.until(lambda: load.seen[200] > 50)
        victim = service.replicas(deployment)[0]
        victim.kill()
        answered = load.seen[200]
        load.until(lambda: load.seen[200] > answered + 100)
        load.until(lambda: len(service.replicas(deployment)) == 2 and not victim.is_running())
        answered = load.seen[200]
        load.until(lambda: load.seen[200] > answered + 50)
    print(f"killed a {deployment}: {dict(load.seen)}")
    assert set(load.seen) <= {200, 503}
    assert load.seen[503] <= clients


def test_five_thousand_requests_with_flat_memory(tmp_path: Path, root: Path) -> None:
    pictures = [png(scene(n)) for n in range(200)]
    settings = SETTINGS | {"replicas": 1, "fronts": 1}
    with started(tmp_path, root, settings) as service:
        processes = [*service.replicas("Front"), *service.replicas("Model"), *service.proxies()]
        assert len(processes) == 3

        def memory() -> list[int]:
            return [p.memory_info().rss // 2**20 for p in processes]

        sizes = []
        for n in range(5000):
            reply = service.segment([pictures[n % 200]], ["red ring", f"phrase {n}"])
            assert reply.status_code == 200
            if n % 1000 == 999:
                sizes.append(memory())
    print("MiB of front, model and proxy, each 1,000 requests:", sizes)
    for first, last in zip(sizes[0], sizes[-1], strict=True):
        assert last - first < 0.1 * first + 20


def test_stopping_finishes_what_is_in_work(tmp_path: Path, root: Path) -> None:
    large = png(scene(0, (1500, 1500)))
    with started(tmp_path, root, SETTINGS | {"replicas": 1, "fronts": 1}) as service:
        assert service.segment([large], ["red ring"]).status_code == 200
        replies: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: replies.append(service.segment([large] * 8, ["red ring", "blue star"]))
        )
        asking.start()
        log = service.log
        # In work: a second, quick request that was sent later is answered meanwhile
        assert service.segment([IMAGE], ["red ring"]).status_code == 200
        service.process.send_signal(signal.SIGTERM)
        asking.join()
        assert service.process.wait(120) == 0
    assert [r.status_code for r in replies] == [200]
    assert all(e["status"] == "ok" for e in replies[0].json()["images"])
    assert "finishing what is in work" in log.read_text()


def test_a_batch_goes_on_after_everything_was_killed(tmp_path: Path, root: Path) -> None:
    count = 48
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for n in range(count):
        (pictures / f"{n:03d}.png").write_bytes(png(scene(n)))
    (pictures / "list.jsonl").write_text("".join(json.dumps({"path": f"{n:03d}.png"}) + "\n" for n in range(count)))
    batches = {"out": str(tmp_path / "batches"), "roots": [str(pictures)], "run": {"batch_size": 2}}
    settings = SETTINGS | {"replicas": 1, "fronts": 1, "batches": batches}
    with started(tmp_path, root, settings) as service:
        asked = {"manifest": "list.jsonl", "phrases": ["red ring"]}
        batch = service.http.post("/v1/batches", json=asked).json()
        while batch["done"] == 0:
            assert batch["state"] in ("queued", "running"), batch
            time.sleep(0.05)
            batch = service.http.get(f"/v1/batches/{batch['id']}").json()
        family = psutil.Process(service.process.pid).children(recursive=True)
        for process in [*family, psutil.Process(service.process.pid)]:
            process.kill()
        psutil.wait_procs(family, 30)
    print(f"killed with {batch['done']} of {count} done")
    assert not (Path(batch["results"]) / "_SUCCESS.json").exists()
    before = {p.name: p.read_bytes() for p in (Path(batch["results"]) / "_checkpoint").glob("*.parquet")}
    (tmp_path / "again").mkdir()
    with started(tmp_path / "again", root, settings) as service:
        end = time.monotonic() + 300
        while batch["state"] in ("queued", "running") and time.monotonic() < end:
            time.sleep(0.5)
            batch = service.http.get(f"/v1/batches/{batch['id']}").json()
    assert (batch["state"], batch["done"], batch["refused"]) == ("succeeded", count, 0), batch
    kept = {p.name: p.read_bytes() for p in (Path(batch["results"]) / "_checkpoint").glob("*.parquet")}
    assert before
    assert before.items() <= kept.items()
    tables = [pq.read_table(p, columns=["id"])["id"].to_pylist() for p in Path(batch["results"]).glob("data/*.parquet")]
    assert sorted(Path(i).name for ids in tables for i in ids) == [f"{n:03d}.png" for n in range(count)]


# --- an update, as a cluster makes it -----------------------------------------------------------------------------

RAY, SERVE = (str(Path(sys.executable).with_name(name)) for name in ("ray", "serve"))


@contextmanager
def cluster(root: Path, dashboard: int) -> Iterator[dict[str, str]]:
    """A Ray of one node with its job server; gives the environment to call it with."""
    with tempfile.TemporaryDirectory(prefix="rc-", ignore_cleanup_errors=True) as home:
        env = os.environ | {"PYTHONPATH": str(root)}
        flags = [
            "--head",
            "--block",
            "--port=0",
            "--num-cpus=16",
            f"--dashboard-port={dashboard}",
            f"--temp-dir={home}",
        ]
        log = Path(home) / "head.log"
        with log.open("wb") as output:
            head = subprocess.Popen(
                [RAY, "start", *flags], env=env, stdout=output, stderr=output, start_new_session=True
            )
        family = psutil.Process(head.pid)
        try:
            end = time.monotonic() + 120
            while not _answers(f"http://127.0.0.1:{dashboard}/api/version"):
                assert time.monotonic() < end, log.read_text()[-2000:]
                time.sleep(0.3)
            yield env | {"RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        finally:
            for process in [*family.children(recursive=True), family]:
                process.kill()
            head.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_a_rolling_update_under_load_loses_no_request(tmp_path: Path, root: Path) -> None:
    port, dashboard = free_port(), free_port()

    def deploy(env: dict[str, str], **settings: Any) -> None:
        tree = yaml.safe_load((root / "serve" / "config.yaml").read_text())
        tree["http_options"] |= {"host": "127.0.0.1", "port": port}
        tree["applications"][0]["args"] = SETTINGS | settings
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(tree))
        done = subprocess.run([SERVE, "deploy", str(file)], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]

    def told(env: dict[str, str]) -> dict[str, Any]:
        address = env["RAY_DASHBOARD_ADDRESS"]
        return dict(
            httpx.get(f"{address}/api/serve/applications/", timeout=30).json()["applications"].get("rlfseg", {})
        )

    def replicas(env: dict[str, str]) -> set[str]:
        parts = told(env).get("deployments", {}).values()
        return {r["replica_id"] for d in parts for r in d["replicas"] if r["state"] == "RUNNING"}

    with cluster(root, dashboard) as env:
        deploy(env, limits={"phrases": 4})
        end = time.monotonic() + 240
        # It answers as soon as one of a kind is there
        while not _answers(f"http://127.0.0.1:{port}/readyz") or len(replicas(env)) < 4:
            assert time.monotonic() < end, told(env)
            time.sleep(0.5)
        old = replicas(env)
        with Clients(f"http://127.0.0.1:{port}", 8) as load:
            load.until(lambda: load.seen[200] > 50)
            deploy(env, limits={"phrases": 5})
            load.until(lambda: len(replicas(env)) == 4 and not replicas(env) & old, 400)
            load.until(lambda: told(env)["status"] == "RUNNING")
            answered = load.seen[200]
            load.until(lambda: load.seen[200] > answered + 50)
        limits = httpx.get(f"http://127.0.0.1:{port}/v1/models").json()["limits"]
    print(f"during the update: {dict(load.seen)}")
    assert limits["phrases"] == 5
    assert set(load.seen) == {200}
