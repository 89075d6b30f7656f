"""Schemathesis asks what the OpenAPI page allows, and what it does not: no 500, and answers that are what it says."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving.harness import Service

pytestmark = pytest.mark.timeout(300)
OPERATIONS = [
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/v1/models"),
    ("GET", "/v1/batches"),
    ("POST", "/v1/batches"),
    ("GET", "/v1/batches/{batch_id}"),
    ("DELETE", "/v1/batches/{batch_id}"),
    ("POST", "/v1/segment"),
]
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def openapi(service: Service) -> Any:
    return schemathesis.openapi.from_url(f"{service.url}/openapi.json", headers={"X-API-Key": service.key})


def test_all_operations_are_here(openapi: Any) -> None:
    found = [result.ok() for result in openapi.get_all_operations()]
    assert {(o.method.upper(), o.path) for o in found} == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_whatever_is_asked(openapi: Any, service: Service, method: str, path: str) -> None:
    operation = openapi[path][method]
    modes = [GenerationMode.POSITIVE, *([GenerationMode.NEGATIVE] if method == "POST" or "{" in path else [])]
    for mode in modes:

        @settings(max_examples=25, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: schemathesis.Case) -> None:
            reply = case.call(headers={"X-API-Key": service.key})
            if reply.status_code != 503:  # full or short is a right answer to a flood
                case.validate_response(reply, checks=CHECKS)

        ask()
