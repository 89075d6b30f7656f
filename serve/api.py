"""The HTTP interface: routes, and how their answers look. What they do is in `work.py` and `batches.py`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from rlfseg import __version__
from rlfseg.config import LimitsConfig, SamplingConfig, ServeConfig
from serve import schema
from serve.batches import Batches
from serve.catalog import Catalog, Entry
from serve.guard import FORM, JSON, Door, Guard, Keys, problem, request_id
from serve.incoming import Source, read_request, validate, wrong_fields
from serve.meters import Meters
from serve.refusal import STATUS, Refusal
from serve.schema import Options, Refused, SegmentAnswer, problems
from serve.work import Work

PAGE = Path(__file__).parent / "page"
NDJSON = "application/x-ndjson"
PAGE_HEADERS = {
    # Nothing is loaded from elsewhere, nothing is inline, and no other site may frame it
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # after an update its parts must fit together
}
T = TypeVar("T")
BatchId = Annotated[str, InPath(pattern="^[0-9a-f]{32}$")]


def build_api(
    config: ServeConfig,
    *,
    catalog: Catalog,
    work: Work,
    batches: Batches | None,
    keys: Keys | None,
    ready: Callable[[], Awaitable[bool]],
    meters: Meters,
) -> FastAPI:
    """The application, with everything that it talks to handed in.

    Args:
        config: Settings of the service.
        catalog: Its models.
        work: Segments pictures.
        batches: Batch jobs; None: switched off.
        keys: API keys; None: all may ask.
        ready: Whether a model answers.
        meters: What is counted.

    Returns:
        An ASGI application; `state.door` closes it.
    """
    api = FastAPI(
        title="rlfseg", version=__version__, docs_url=None, redoc_url=None, separate_input_output_schemas=False
    )
    api.state.door = Door()
    api.add_middleware(Guard, config=config, keys=keys, meters=meters, door=api.state.door)
    _add_errors(api, config, meters)
    _add_health(api, ready)
    _add_segment(api, config, catalog, work, ready, meters)
    _add_batches(api, batches, config)
    _add_page(api)
    api.openapi = lambda: _openapi(api, needs_key=keys is not None)  # type: ignore[method-assign]

    @api.get("/v1/models", summary="The models that requests may name", responses=problems(401, 421))
    def models() -> schema.Models:
        limits = config.limits
        asked = ("body_mb", "pixels", "images", "phrases", "phrase_chars", "steps", "passes", "deadline_s")
        return schema.Models(models=catalog.listed(), limits={name: getattr(limits, name) for name in asked})

    return api


# --- errors ----------------------------------------------------------------------------------------------------------


def _add_errors(api: FastAPI, config: ServeConfig, meters: Meters) -> None:
    """Every error in one shape."""

    def answer(request: Request, refusal: Refusal) -> JSONResponse:
        meters.error(refusal.kind)
        return problem(refusal, request_id(request.headers), config.limits.retry_after_s)

    @api.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> JSONResponse:
        return answer(request, error)

    @api.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(request, Refusal("invalid", wrong_fields(error.errors())))

    @api.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        kind = {404: "not_found", 405: "method"}.get(error.status_code, "invalid")
        reply = answer(request, Refusal(kind, str(error.detail)))
        reply.headers.update(error.headers or {})
        return reply

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:  # Starlette logs it
        return answer(request, Refusal("failed", "internal error; the server's log has it under this request's id"))


def _late(config: ServeConfig) -> Refusal:
    return Refusal("deadline", f"the request did not arrive within {config.limits.deadline_s:g} s")


# --- health ----------------------------------------------------------------------------------------------------------


def _add_health(api: FastAPI, ready: Callable[[], Awaitable[bool]]) -> None:
    @api.get("/healthz", summary="Whether the service lives")
    async def healthz() -> schema.State:
        return schema.State()

    @api.get("/readyz", summary="Whether a model is loaded and answers", responses=problems(503))
    async def readyz() -> schema.State:
        if not await ready():
            raise Refusal("starting", "no model answers yet")
        return schema.State()


# --- segment ---------------------------------------------------------------------------------------------------------


def _add_segment(
    api: FastAPI,
    config: ServeConfig,
    catalog: Catalog,
    work: Work,
    ready: Callable[[], Awaitable[bool]],
    meters: Meters,
) -> None:
    @api.post(
        "/v1/segment",
        summary="Masks for phrases on pictures",
        description="The status is 200 if any picture was segmented; each entry has a status of its own.",
        response_model=SegmentAnswer,
        responses={
            200: {"content": {NDJSON: {"schema": {"type": "string"}}}, "description": "With `stream`: NDJSON."},
            **problems(401, 404, 413, 415, 421, 422, 500, 503, 504),
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    kind: {"schema": {"$ref": f"#/components/schemas/{name}"}}
                    for kind, name in ((JSON, "SegmentRequest"), (FORM, "SegmentForm"))
                },
            }
        },
    )
    async def segment(request: Request) -> Response:
        start = time.perf_counter()
        until = asyncio.get_running_loop().time() + config.limits.deadline_s
        if not await ready():
            raise Refusal("starting", "no model answers yet")
        try:
            async with asyncio.timeout_at(until):
                options, sources = await read_request(request, config.limits)
        except TimeoutError:
            raise _late(config) from None
        _check_passes(options, config.limits)
        entry = catalog[options.model]
        catalog.check(entry, options.rescale)
        answer = _Answer(work, options, sources, entry, until=until, start=start, request=request, meters=meters)
        if options.stream:
            return StreamingResponse(answer.lines(), media_type=NDJSON)
        return await answer.whole(config)


def _check_passes(options: Options, limits: LimitsConfig) -> None:
    """Refuses what would keep the network from everybody else."""
    steps = SamplingConfig().hss_steps if options.rescale == "hss" else options.steps
    passes = len(options.phrases) * steps
    if passes > limits.passes:
        asked = f"{len(options.phrases)} phrases with {steps} steps"
        raise Refusal("invalid", f"phrases, steps: {asked} are {passes} passes, more than {limits.passes}")


class _Answer:
    """The answer to one request, as a whole or line by line."""

    def __init__(
        self,
        work: Work,
        options: Options,
        sources: list[Source],
        entry: Entry,
        *,
        until: float,
        start: float,
        request: Request,
        meters: Meters,
    ):
        self.start, self.meters, self.id = start, meters, request_id(request.headers)
        self.pictures = work.pictures(sources, options, entry, request=self.id, until=until)

    async def whole(self, config: ServeConfig) -> Response:
        entries = sorted([entry async for entry in self.pictures], key=lambda entry: entry.index)
        bad = [entry for entry in entries if isinstance(entry, Refused)]
        error = bad[0].error if len(bad) == len(entries) else None
        body = SegmentAnswer(request_id=self.id, images=entries, total_ms=self._end(), error=error)
        status = STATUS[error.kind] if error else 200
        headers = {"Retry-After": str(config.limits.retry_after_s)} if status == 503 else {}
        text = await asyncio.to_thread(body.model_dump_json)
        return Response(text, status, headers, media_type=JSON)

    async def lines(self) -> AsyncIterator[str]:
        ok = failed = 0
        async for entry in self.pictures:
            ok, failed = ok + (entry.status == "ok"), failed + (entry.status == "error")
            yield await asyncio.to_thread(entry.model_dump_json) + "\n"
        yield schema.StreamEnd(request_id=self.id, ok=ok, failed=failed, total_ms=self._end()).model_dump_json() + "\n"

    def _end(self) -> float:
        seconds = time.perf_counter() - self.start
        self.meters.request(seconds)
        return 1000 * seconds


# --- batches ---------------------------------------------------------------------------------------------------------


def _add_batches(api: FastAPI, batches: Batches | None, config: ServeConfig) -> None:
    errors = problems(401, 404, 421, 422, 500, 503)
    threads = ThreadPoolExecutor(4, "batches")  # apart: they wait for disks and for Ray, and pictures must not

    def switched_on() -> Batches:
        if batches is None:
            raise Refusal("not_found", "batches are switched off: the service has no folder for them (batches.out)")
        return batches

    async def apart(call: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, call, *args)

    @api.post(
        "/v1/batches",
        status_code=202,
        summary="Start a batch job",
        responses=errors | problems(413, 415, 504),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {JSON: {"schema": {"$ref": "#/components/schemas/BatchRequest"}}},
            }
        },
    )
    async def create(request: Request) -> schema.Batch:
        jobs = switched_on()
        try:
            async with asyncio.timeout(config.limits.deadline_s):
                body = await request.body()
        except TimeoutError:
            raise _late(config) from None
        return await apart(jobs.create, await apart(validate, schema.BatchRequest, body))

    @api.get("/v1/batches", summary="All batches", responses=errors)
    async def listed() -> schema.Batches:
        return schema.Batches(batches=await apart(switched_on().list))

    @api.get("/v1/batches/{batch_id}", summary="State and progress of a batch", responses=errors)
    async def get(batch_id: BatchId) -> schema.Batch:
        return await apart(switched_on().get, batch_id)

    @api.delete("/v1/batches/{batch_id}", summary="Cancel a batch", responses=errors)
    async def cancel(batch_id: BatchId) -> schema.Batch:
        return await apart(switched_on().cancel, batch_id)


# --- the page --------------------------------------------------------------------------------------------------------


def _add_page(api: FastAPI) -> None:
    def sender(file: Path) -> Callable[[], FileResponse]:
        return lambda: FileResponse(file, headers=PAGE_HEADERS)

    for file in PAGE.iterdir():
        path = "/" if file.name == "page.html" else f"/page/{file.name}"
        api.add_api_route(path, sender(file), include_in_schema=False, response_class=FileResponse)


# --- OpenAPI ---------------------------------------------------------------------------------------------------------


def _openapi(api: FastAPI, *, needs_key: bool) -> dict[str, Any]:
    """FastAPI's page, with the bodies that routes read themselves, and how to give a key."""
    if api.openapi_schema is None:
        tree = get_openapi(title=api.title, version=api.version, routes=api.routes)
        components = tree["components"]
        for model in (schema.SegmentRequest, schema.SegmentForm, schema.BatchRequest):
            own = model.model_json_schema(ref_template="#/components/schemas/{model}")
            components["schemas"] |= own.pop("$defs", {}) | {model.__name__: own}
        if needs_key:
            components["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            }
            tree["security"] = [{"bearer": []}, {"header": []}]
        api.openapi_schema = tree
    return api.openapi_schema
