"""What the service counts for Prometheus, beside Serve's own figures; Ray exports both on each node.

Serve's own: `ray_serve_batch_utilization_percent` (batch fill), `ray_serve_batch_queue_length` and
`ray_serve_deployment_queued_queries` (queue lengths), `ray_serve_num_http_requests` by route and status.
"""

from __future__ import annotations

from ray.serve.metrics import Counter, Histogram

from serve.schema import Timing

SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60]


class Meters:
    """Latency by stage, pictures by outcome, errors by kind."""

    def __init__(self) -> None:
        self._stages = Histogram(
            "rlfseg_stage_seconds",
            description="Time of a picture in each stage: decode, wait, encode, network, draw; `total` is a request's.",
            boundaries=SECONDS,
            tag_keys=("stage",),
        )
        self._pictures = Counter(
            "rlfseg_pictures",
            description="Pictures segmented; `cached`: by a known latent.",
            tag_keys=("cached",),
        )
        self._errors = Counter(
            "rlfseg_errors", description="Requests, pictures and phrases not answered.", tag_keys=("kind",)
        )

    def picture(self, timing: Timing, *, cached: bool) -> None:
        """A picture was segmented."""
        self._pictures.inc(tags={"cached": str(cached).lower()})
        for stage, milliseconds in timing:
            self._stages.observe(milliseconds / 1000, tags={"stage": stage})

    def request(self, seconds: float) -> None:
        """A request was answered."""
        self._stages.observe(seconds, tags={"stage": "total"})

    def error(self, kind: str) -> None:
        """Something was not answered; `kind` as in `serve.refusal.STATUS`."""
        self._errors.inc(tags={"kind": kind})
