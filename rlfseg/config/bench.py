"""Settings of `rlfseg bench`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rlfseg.config.parts import STRICT, OutFolder, Positive, PositiveInt, TrackingConfig
from rlfseg.config.serving import ServeConfig


@dataclass(config=STRICT, frozen=True, kw_only=True)
class BenchConfig:
    """Measures rlfseg's ways against the plain ones, as ratios in one run."""

    what: tuple[Literal["data", "model", "stages", "sd", "serve"], ...] = ()
    """`data`: measures, reading and evaluation; `model`: inference, training, selection, refinement; `stages`: Ray Data
    against a loop; `sd`: what SD v1.5's full size costs; `serve`: the service under load. None: all of them."""
    out: OutFolder = "runs/bench"
    """Folder to write bench.json and machine.json to, and files of the run; older ones are replaced."""
    images: PositiveInt = 1000
    """For `data`: pictures of 512 x 512 with 4 masks each; all are read, half are evaluated. 0.8 MB of disk each."""
    rounds: PositiveInt = 3
    """How often each way is measured, in turn; the median counts. A first round that doesn't count comes before."""
    quick: bool = False
    """For `model`, `stages` and `sd`: a small model, few images or small ones; to try the bench itself."""
    serve: ServeConfig = Field(default_factory=ServeConfig)
    """For `serve`: the service."""
    seconds: Positive = 10.0
    """For `serve`: of each of its measurements."""
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    """MLflow."""
