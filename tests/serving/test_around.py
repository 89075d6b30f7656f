"""The service over real HTTP: what is around its masks, from the gate to a flood."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
import yaml

from rlfseg.images import rle_decode
from rlfseg.segmenter import Segmenter
from tests.serving.checked import same
from tests.serving.harness import Service, base64_of, png, scene

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="session")
def here() -> Segmenter:
    return Segmenter.load("tiny", device="cpu")


def test_what_one_may_ask(service: Service) -> None:
    told = service.http.get("/v1/models").json()
    assert [(m["name"], m["default"]) for m in told["models"]] == [("tiny", True), ("other", False)]
    assert told["models"][1]["rescale"] == ["none"]  # not calibrated
    assert told["limits"]["phrases"] == 5
    for name in ("none", "../tiny", "hf:evil/model", "/etc"):
        assert service.segment([png(scene(0))], ["red ring"], model=name).status_code == 404


def test_too_large_requests_are_refused(service: Service) -> None:
    assert service.segment([b"\0" * 13 * 2**20], ["red ring"]).status_code == 413


def test_it_said_that_it_was_not_ready(service: Service) -> None:
    assert service.before[-1] == 200
    assert set(service.before[:-1]) >= {503}


def test_the_gate(service: Service) -> None:
    def status(method: str, path: str, **headers: str) -> int:
        plain = {name.replace("_", "-"): value for name, value in headers.items()}
        reply = httpx.request(method, service.url + path, content=b"{}" if method == "POST" else None, headers=plain)
        assert not [name for name in reply.headers if name.startswith("access-control")]
        return reply.status_code

    key = {"X_API_Key": service.key}
    assert status("GET", "/v1/models", **key) == 200
    assert status("GET", "/v1/models", X_API_Key="no") == 401
    assert status("GET", "/v1/models", Host="evil.org", **key) == 421
    assert status("POST", "/v1/segment", Content_Type="text/plain", **key) == 415
    origin = {"Origin": "http://evil.org", "Access_Control_Request_Method": "POST"}
    assert status("OPTIONS", "/v1/segment", **origin, **key) == 421
    assert status("GET", "/v1/models", Origin=service.url, Sec_Fetch_Site="same-origin", **key) == 200


def test_clients_do_not_steer_serve(service: Service) -> None:
    for name in ("X-Request-Timeout-Seconds", "X-Request-ID", "serve_multiplexed_model_id", "X-Session-Id"):
        for value in (b"0.001", b"\xff\xfe"):
            reply = service.http.get("/v1/models", headers={name: value})
            assert reply.status_code == 200
    assert len(service.http.get("/healthz", headers={"X-Request-ID": b"\xff"}).headers["x-request-id"]) == 32


def test_a_flood_is_told_to_come_back_and_leaves_nothing_behind(service: Service) -> None:
    image = png(scene(5, (200, 200)))

    def seconds() -> float:
        start = time.perf_counter()
        assert service.segment([image], ["red ring"]).status_code == 200
        return time.perf_counter() - start

    before = sorted(seconds() for _ in range(5))
    with ThreadPoolExecutor(100) as pool:
        replies = list(pool.map(lambda _: service.segment([image], ["red ring"]), range(300)))
    assert {r.status_code for r in replies} == {200, 503}
    for reply in replies:
        if reply.status_code == 503:
            assert int(reply.headers["retry-after"]) > 0
            assert reply.json()["error"]["kind"] == "overloaded"
            assert reply.json()["request_id"] == reply.headers["x-request-id"]
    after = sorted(seconds() for _ in range(5))
    assert after[0] < 3 * before[-1] + 0.1  # the fastest now against the slowest then


def test_request_ids_are_in_answers_and_logs(service: Service) -> None:
    reply = service.http.post(
        "/v1/segment",
        json={"images": [{"data": base64_of(png(scene(0)))}], "phrases": ["red ring"]},
        headers={"X-Request-ID": "ticket-4711"},
    )
    assert reply.headers["x-request-id"] == reply.json()["request_id"] == "ticket-4711"
    refused = service.http.get("/v1/nothing")
    assert refused.json()["request_id"] == refused.headers["x-request-id"]
    logged = b"".join(text for path, text in service.written() if "serve" in str(path))
    assert b"ticket-4711" in logged


def test_metrics(service: Service) -> None:
    service.segment([png(scene(0)), b"no picture"], ["red ring"])
    wanted = {
        "ray_rlfseg_stage_seconds_count": ('stage="network"', 'stage="decode"', 'stage="total"'),
        "ray_rlfseg_errors_total": ('kind="picture"',),
        "ray_rlfseg_pictures_total": ('cached="true"',),
        "ray_serve_batch_utilization_percent_count": (),
        "ray_serve_batch_queue_length": (),
        "ray_serve_deployment_queued_queries": (),
    }

    def missing() -> list[tuple[str, str]]:
        names = list(service.metrics())
        pairs = [(name, label) for name, labels in wanted.items() for label in labels or ("",)]
        return [(name, label) for name, label in pairs if not any(n.startswith(name) and label in n for n in names)]

    until = time.monotonic() + 60
    while missing() and time.monotonic() < until:
        time.sleep(0.5)  # replicas export at intervals
    assert missing() == []
    port = yaml.safe_load((service.log.parent / "serve.yaml").read_text())["metrics_port"]
    assert f":{port}/metrics\n" in service.log.read_text()  # where all of these were read


def test_no_key_is_ever_written(service: Service) -> None:
    wrong = "a-wrong-key-that-must-not-be-logged-either"
    for key in (service.key, wrong):
        for path in ("/v1/models", f"/v1/segment?key={0}"):
            httpx.get(service.url + path, headers={"Authorization": f"Bearer {key}"})
    logs = list(service.written())
    assert len(logs) > 10
    assert [path for path, text in logs if service.key.encode() in text or wrong.encode() in text] == []


def test_a_batch_runs_to_its_end(service: Service, here: Segmenter, pictures: Path) -> None:
    asked = {"images": ["0.png", "1.png", "broken.jpg"], "phrases": ["red ring"]}
    reply = service.http.post("/v1/batches", json=asked)
    assert reply.status_code == 202, reply.text
    batch = reply.json()
    second = service.http.post("/v1/batches", json=asked | {"images": ["2.png"]})
    if second.status_code == 202:
        cancelled = service.http.delete(f"/v1/batches/{second.json()['id']}").json()
        assert cancelled["state"] == "cancelled"
    else:
        assert (second.status_code, second.json()["error"]["kind"]) == (503, "short")
    until = time.monotonic() + 200
    while batch["state"] in ("queued", "running") and time.monotonic() < until:
        time.sleep(0.5)
        batch = service.http.get(f"/v1/batches/{batch['id']}").json()
    assert (batch["state"], batch["images"], batch["done"], batch["refused"]) == ("succeeded", 3, 3, 1), batch
    tables = [pq.read_table(p).to_pylist() for p in Path(batch["results"]).glob("data/*.parquet")]
    rows = {Path(row["id"]).name: row for rows in tables for row in rows}
    assert set(rows) == {"0.png", "1.png", "broken.jpg"}
    for name in ("0.png", "1.png"):
        [expected] = here(pictures / name, ["red ring"])
        assert same(rle_decode(rows[name]["masks"][0], expected.mask.shape), expected)
    assert batch["id"] in [b["id"] for b in service.http.get("/v1/batches").json()["batches"]]
    outside = service.http.post("/v1/batches", json={"images": ["../x.png"], "phrases": ["a"]})
    assert (outside.status_code, outside.json()["error"]["kind"]) == (422, "invalid")


@pytest.mark.slow
@pytest.mark.fault("serve-05")
@pytest.mark.timeout(900)
def test_large_pictures_leave_no_memory_behind(service: Service) -> None:
    large = [png(scene(n, (2000, 2000)), compress_level=1) for n in range(4)]
    processes = [*service.replicas("Front"), *service.replicas("Model"), *service.proxies()]
    sizes = []
    for n in range(500):
        assert service.segment([large[n % 4]], ["red ring"]).status_code == 200
        if n % 100 == 99:
            sizes.append([p.memory_info().rss // 2**20 for p in processes])
    print("MiB of front, model and proxy, each 100 requests:", sizes)
    for second, last in zip(sizes[1], sizes[-1], strict=True):
        assert last - second < 0.1 * second + 20
