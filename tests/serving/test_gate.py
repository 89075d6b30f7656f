"""The gate of the HTTP interface: what is refused before a body is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from serve.guard import Keys
from serve.work import AskModel
from tests.serving.harness import base64_of
from tests.serving.played import IMAGE, LIMITS, PHRASES, Counted, build, call, kind, shipped


@pytest.fixture(scope="module")
def ask() -> AskModel:
    return shipped()


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    (tmp_path / "keys").write_text("# ours\nfirst-key\nsecond-key\n\n")
    return Keys(str(tmp_path / "keys"))


@pytest.mark.parametrize(
    ("headers", "known"),
    [
        ({}, False),
        ({"Authorization": "Bearer first-key"}, True),
        ({"Authorization": "bearer  second-key"}, True),
        ({"X-API-Key": "second-key"}, True),
        ({"X-API-Key": "second-kez"}, False),
        ({"X-API-Key": "# ours"}, False),
        ({"X-API-Key": ""}, False),
        ({"Authorization": "Basic first-key"}, False),
        ({"Authorization": "Bearer first-key second-key"}, False),
        ({"X-API-Key": "\xe9"}, False),
    ],
)
def test_keys(ask: AskModel, keys: Keys, headers: dict[str, str], known: bool) -> None:
    given = {name: value.encode("latin-1") for name, value in headers.items()}
    reply = call(build(ask, keys=keys), "GET", "/v1/models", headers=given)
    assert reply.status_code == (200 if known else 401)
    if not known:
        assert reply.headers["www-authenticate"] == "Bearer"


def test_only_health_and_the_page_need_no_key(ask: AskModel, keys: Keys) -> None:
    api = build(ask, keys=keys)
    open_to_all = [p for p in ("/", "/healthz", "/readyz") if call(api, "GET", p).status_code == 200]
    assert open_to_all == ["/", "/healthz", "/readyz"]
    for path in ("/openapi.json", "/v1/models", "/v1/batches", "/docs", "/nothing", "/healthz/"):
        assert call(api, "GET", path).status_code == 401


def test_keys_change_with_their_file_and_a_broken_file_changes_nothing(keys: Keys) -> None:
    keys.path.write_text("third-key\n")
    assert (keys.know("third-key"), keys.know("first-key")) == (True, False)
    keys.path.write_text("")
    assert keys.know("third-key")
    keys.path.unlink()
    assert keys.know("third-key")


def test_every_key_is_compared(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("serve.guard.hmac.compare_digest", lambda a, b: (calls.append(b), a == b)[1])
    assert keys.know("first-key")
    assert len(calls) == 2


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "LOCALHOST", "127.0.0.1:1", "[::1]:8000", "[::1]"])
def test_hosts_that_are_ours(ask: AskModel, host: str) -> None:
    assert call(build(ask), "GET", "/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.org", "localhost.evil.org", "evil.org:localhost", "", "[::2]", "127.0.0.1.nip.io"]
)
def test_other_hosts_are_refused(ask: AskModel, host: str) -> None:
    api = build(ask)
    assert kind(call(api, "GET", "/v1/models", headers={"Host": host})) == (421, "host")
    assert call(api, "GET", "/", headers={"Host": host}).status_code == 421
    assert call(api, "GET", "/healthz", headers={"Host": host}).status_code == 200
    assert call(build(ask, hosts=("*",)), "GET", "/v1/models", headers={"Host": host}).status_code == 200


def test_pages_of_other_sites_get_nothing(ask: AskModel) -> None:
    api = build(ask)
    body = {"images": [{"data": base64_of(IMAGE)}], "phrases": PHRASES}
    plain = call(api, "POST", "/v1/segment", content=json.dumps(body), headers={"Content-Type": "text/plain"})
    assert kind(plain) == (415, "media_type")
    for site, status in (("cross-site", 421), ("same-site", 421), ("same-origin", 200), ("none", 200)):
        assert call(api, "GET", "/v1/models", headers={"Sec-Fetch-Site": site}).status_code == status
    preflight = {"Origin": "http://evil.org", "Access-Control-Request-Method": "POST"}
    reply = call(api, "OPTIONS", "/v1/segment", headers=preflight)
    assert reply.status_code == 421
    assert not [name for name in reply.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://localhost"}, 200),
        ({"Origin": "https://localhost"}, 200),  # TLS ends before the service
        ({"Origin": "http://evil.org"}, 421),
        ({"Origin": "http://localhost:9000"}, 421),
        ({"Origin": "http://localhost.evil.org"}, 421),
        ({"Origin": "null"}, 421),
        ({"Origin": "http://evil.org", "Sec-Fetch-Site": "cross-site"}, 421),
        # A balancer may call us by another name than the browser knows, which compared them itself
        ({"Origin": "https://a.org", "Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_forms_of_other_sites_are_refused(ask: AskModel, headers: dict[str, str], status: int) -> None:
    files = [("images", ("a.png", IMAGE))]
    reply = call(build(ask), "POST", "/v1/segment", files=files, data={"phrases": "a"}, headers=headers)
    assert reply.status_code == status


def test_what_the_gate_refuses_is_counted(ask: AskModel, keys: Keys) -> None:
    meters, key = Counted(), {"X-API-Key": "first-key"}
    api = build(ask, keys=keys, meters=meters)
    call(api, "GET", "/v1/models")
    call(api, "GET", "/v1/models", headers={"Host": "evil.org"})
    call(api, "POST", "/v1/segment", content=b"{}", headers=key | {"Content-Type": "text/plain"})
    call(api, "POST", "/v1/segment", content=b"x" * 100_000, headers=key | {"Content-Type": "application/json"})
    assert meters.errors == {"unauthorized": 1, "host": 1, "media_type": 1, "too_large": 1}


def test_the_gate_knows_paths_below_a_prefix(ask: AskModel) -> None:
    outer = Starlette(routes=[Mount("/bench", build(ask))])
    assert call(outer, "GET", "/bench/healthz", headers={"Host": "evil.org"}).status_code == 200
    files = [("images", ("a.png", IMAGE))]
    reply = call(outer, "POST", "/bench/v1/segment", files=files, data={"phrases": "a"})
    assert reply.status_code == 200


def test_batches_take_json_alone(ask: AskModel) -> None:
    for headers in ({}, {"Content-Type": "multipart/form-data; boundary=x"}, {"Content-Type": "application/jsonx"}):
        assert kind(call(build(ask), "POST", "/v1/batches", content=b"{}", headers=headers)) == (415, "media_type")
    assert kind(call(build(ask), "POST", "/v1/batches", json={})) == (404, "not_found")  # switched off here


@pytest.mark.parametrize("told", [True, False])
def test_a_body_is_cut_off_at_the_limit_whatever_its_header_says(ask: AskModel, told: bool) -> None:
    limit, read = int(LIMITS.body_mb * 2**20), [0]

    async def endless(begin: bytes) -> Any:
        yield begin
        for _ in range(100):
            read[0] += limit // 4
            yield b"x" * (limit // 4)

    headers = {"Content-Length": str(100 * limit)} if told else {}
    part = b'--b\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
    for media, begin in (("application/json", b""), ("multipart/form-data; boundary=b", part)):
        read[0] = 0
        reply = call(
            build(ask), "POST", "/v1/segment", content=endless(begin), headers=headers | {"Content-Type": media}
        )
        assert kind(reply) == (413, "too_large")
        assert read[0] <= (limit // 4 if told else 2 * limit)
