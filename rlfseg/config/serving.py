"""The service and those who ask it: `rlfseg serve`, `serve run serve.app:app`, `rlfseg segment`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rlfseg.config.parts import (
    STRICT,
    FastConfig,
    Fraction,
    Natural,
    OutFolder,
    Positive,
    PositiveInt,
    SamplingConfig,
    WorkersConfig,
)

LOOPBACK = ("127.0.0.1", "::1", "localhost")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class LimitsConfig:
    """What one request may ask, checked before any picture is decoded, and what happens when there are too many."""

    body_mb: Positive = 32.0
    """Size of a request, in MiB; more is answered 413."""
    answer_mb: Positive = 64.0
    """Size of an answer's masks, in MiB; what goes beyond is answered by an error in its place."""
    pixels: PositiveInt = 24_000_000
    """Height times width of a picture."""
    images: PositiveInt = 32
    """Pictures of a request."""
    phrases: PositiveInt = 16
    """Phrases of a picture."""
    phrase_chars: PositiveInt = 1000
    """Characters of a phrase."""
    steps: PositiveInt = 50
    """Euler steps that a request may ask for."""
    passes: PositiveInt = 160
    """Phrases times steps (of HSS: 5): passes of each picture through the network, for which all others wait."""
    requests: PositiveInt = 64
    """Requests that a front replica works on at a time; as many may wait, and further ones are answered 503."""
    queue: PositiveInt = 64
    """Pictures that may wait at a model replica, and as many at each front replica for a place there; further ones are
    answered 503."""
    deadline_s: Positive = 60.0
    """Seconds after which a request is given up and answered 504."""
    retry_after_s: PositiveInt = 2
    """Seconds that a 503 asks the client to wait."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class BatchesConfig:
    """Batch jobs that the service starts on its own Ray."""

    out: OutFolder | None = None
    """Folder for settings, states and results, the same on all nodes; null: no batches."""
    roots: tuple[str, ...] = ()
    """Folders whose pictures and manifests a batch may read; no path outside them is opened."""
    images: PositiveInt = 1_000_000
    """Pictures of a batch."""
    run: WorkersConfig = Field(default_factory=WorkersConfig)
    """Actors, GPUs and batch size of each batch."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ServeConfig:
    """The service: which models, how large, how much of it, for whom."""

    models: dict[Name, str] = Field(default_factory=lambda: {"tiny": "tiny"})
    """What requests may name: name -> `tiny`, a folder, `hf:owner/name@revision`, `models:/...`, `runs:/...`.
    The first is the default."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU where there is one."""
    fast: FastConfig = Field(default_factory=FastConfig)
    """How masks are computed faster."""
    batch_size: PositiveInt = 8
    """Pictures, each with all its phrases, that go through the network together at most."""
    batch_wait_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds that a picture waits for others to share its batch; 0: whoever came while the last was in work."""
    replicas: PositiveInt = 1
    """Model replicas at least."""
    max_replicas: PositiveInt | None = None
    """Model replicas at most, by load; null: as many as `replicas`."""
    fronts: PositiveInt = 1
    """Replicas that speak HTTP, decode pictures and draw masks."""
    cpus: Positive = 1.0
    """Logical CPUs that each model replica reserves; without a GPU it computes with as many threads."""
    gpus: Annotated[float, Field(ge=0)] | None = None
    """GPUs that each model replica reserves, a fraction to share one; null: 1 where there is one, else 0."""
    resident: PositiveInt = 2
    """Models that a replica keeps loaded; beyond, the one least recently asked gives way."""
    cache_mb: Annotated[float, Field(ge=0)] = 256.0
    """Memory of a replica for latents of recent pictures, in MiB: asked again, a picture is not encoded again."""
    surge_percent: Annotated[int, Field(ge=0, le=100)] = 100
    """Model replicas beyond their number while an update rolls out, so that none stops before its successor is ready;
    0 where no GPU is free for one: then requests wait in the queue meanwhile."""
    drain_s: Positive = 30.0
    """Seconds that requests in work have to finish when a replica is stopped."""
    auth: bool | None = None
    """`on`: every request but health checks and the page names a key of `keys_file`; `off`: none does. Null: off for
    `rlfseg serve` on a loopback address, else on."""
    keys_file: str | None = None
    """File with an API key a line, `#` begins a comment; read again when it changes. Its content is never logged."""
    hosts: tuple[str, ...] = LOOPBACK
    """Names by which clients may call the service (the Host header, without port); `*` allows any."""
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    """What a request may ask."""
    batches: BatchesConfig = Field(default_factory=BatchesConfig)
    """Batch jobs."""
    host: str = "127.0.0.1"
    """Address that `rlfseg serve` listens on; on a cluster Serve's own `http_options` decide."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port that `rlfseg serve` listens on."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port at which the Ray of `rlfseg serve` exports metrics for Prometheus; 0: a free one, printed at the start."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SegmentConfig:
    """Phrases on one picture, here or by a service."""

    image: str
    """A picture."""
    phrases: tuple[str, ...]
    """What to look for."""
    out: OutFolder = "."
    """Folder to write a mask a phrase (PNG) and an overlay to."""
    url: str | None = None
    """A service to ask, such as http://127.0.0.1:8000; null: the model runs here."""
    key_file: str | None = None
    """File that holds the service's API key; null: $RLFSEG_API_KEY, if set."""
    model: str | None = None
    """A model of the service by name, or here a reference such as `tiny` or a folder; null: the first, or `tiny`."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    """Steps, AOS or HSS; a service takes `steps` and `rescale` alone."""
    threshold: Fraction | None = None
    """Score above which a pixel is mask; null: the model's own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU where there is one; without effect with `url`."""
    retries: Natural = 5
    """How often a service that is busy is asked again."""
