"""Settings of the commands that make and measure masks."""

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
    TrackingConfig,
    WorkersConfig,
)


@dataclass(config=STRICT, frozen=True, kw_only=True)
class CalibrateConfig:
    """Chooses the mask threshold and the eps of AOS and HSS on a validation split and writes them into the adapter."""

    adapter: str
    """Adapter folder; calibration is written into it."""
    samples: str
    """Folder written by `prepare`: a validation split, never the test split."""
    out: OutFolder
    """Folder to write the search's results to."""
    eps: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.05, 0.1, 0.2, 0.4, 0.8)
    """Values to try; at least one."""
    gamma_max: Positive | None = 0.25
    """Upper limit of gamma; null: none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU where there is one."""
    run: WorkersConfig = Field(default_factory=WorkersConfig)
    """Actors, GPUs, batch size."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad sample does to the job: stop it, or be counted and skipped."""
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    """MLflow."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class EvaluateConfig:
    """Measures an adapter, or predictions already made, against a test split, by named protocols."""

    samples: str
    """Folder written by `prepare`, with the true masks."""
    out: OutFolder
    """Folder to write results.json, results.md, curves and overlays to."""
    adapter: str | None = None
    """Adapter to measure: `tiny`, a folder, `hf:owner/name@revision`, `models:/...` or `runs:/...`."""
    predictions: str | None = None
    """Predictions to measure instead: a folder of `predict`, `refine` or `prepare`, a folder ID/PHRASE.png of another
    system, a CSV or JSONL list of `id`, `phrase`, `png`, or Parquet with COCO RLE (docs/evaluation.md)."""
    png_values: Literal["auto", "masks", "scores"] = "auto"
    """What those PNGs hold; `auto` sees it, and refuses a file that may be either."""
    base_only: bool = False
    """Measure the adapter's base without the adapter."""
    protocol: tuple[str, ...] | str = "rlfseg"
    """What to compute, in one pass over the predictions: any of `rlfseg`, `clipseg`, `phrasecut`, `refer`, `gres`,
    `semseg`, as a list or separated by commas; docs/evaluation.md says what each is."""
    clipseg_side: Literal[352, 384] = 352
    """For `clipseg`: side of the square in pixels; 352 as CLIPSeg, 384 as LD-ZNet."""
    refer_side: Literal[480, 512] = 512
    """For `refer`: side of the square in pixels; 512 as VPD, 480 as LAVT."""
    present_only: bool = False
    """For `semseg`: choose among the classes of the picture alone, not among all of the set."""
    resamples: Natural = 1000
    """Draws of the bootstrap over images, for 95 % confidence intervals; 0: none."""
    seed: Natural = 42
    """Seed of these draws."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    """How masks are sampled."""
    threshold: Fraction | None = None
    """Score above which a pixel is mask; null: the adapter's own, set by `calibrate`, and 0.5 for predictions."""
    fast: FastConfig = Field(default_factory=FastConfig)
    """How masks are computed faster, at some cost in quality: measure both."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU where there is one."""
    overlays: Natural = 8
    """Best and worst images to draw, of each."""
    run: WorkersConfig = Field(default_factory=WorkersConfig)
    """Actors, GPUs, batch size."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad sample does to the job: stop it, or be counted and skipped."""
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    """MLflow."""

    @property
    def protocols(self) -> tuple[str, ...]:
        """`protocol` as names, each once, in order."""
        names = self.protocol.split(",") if isinstance(self.protocol, str) else self.protocol
        return tuple(dict.fromkeys(name.strip() for name in names))


@dataclass(config=STRICT, frozen=True, kw_only=True)
class PredictConfig:
    """Masks for phrases on many pictures."""

    images: str
    """Pictures, Parquet files (`path`, or `image` with bytes) or HDF5 files: a file, a folder without those in it, a
    glob ('photos/**/*.jpg' goes deeper), or one of these at a URL (s3://bucket/folder); or a folder of `prepare`."""
    out: OutFolder
    """Folder to write Parquet with masks as COCO RLE to, and PNGs and overlays on request."""
    phrases: tuple[str, ...] = ()
    """Phrases to ask of every picture; may be empty where each picture brings its own."""
    phrases_file: str | None = None
    """A text file with a phrase a line, added to `phrases`."""
    phrases_column: str = "phrases"
    """Column of Parquet files with each picture's own phrases: text, or lists of text."""
    adapter: str = "tiny"
    """`tiny`, a folder, `hf:owner/name@revision`, `models:/...` or `runs:/...`."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    """How masks are sampled."""
    fast: FastConfig = Field(default_factory=FastConfig)
    """How masks are computed faster."""
    threshold: Fraction | None = None
    """Score above which a pixel is mask; null: the adapter's own."""
    png: bool = False
    """Also write each mask as a PNG."""
    overlays: bool = False
    """Also write an overlay a picture."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU where there is one."""
    run: WorkersConfig = Field(default_factory=WorkersConfig)
    """Actors, GPUs, batch size."""
    pixels: Annotated[int, Field(gt=0, le=178_956_970)] = 64_000_000
    """Height times width of a picture, by its header; a larger one is bad. Of HDF5's, 64,000,000 is the limit."""
    on_error: Literal["stop", "skip"] = "skip"
    """What a bad picture does to the job: stop it, or be reported and skipped."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ExportConfig:
    """Writes an adapter, or refined labels, in the form in which other tools read them."""

    out: OutFolder
    """Folder to write to."""
    adapter: str | None = None
    """Adapter to write for diffusers: `tiny`, a folder, `hf:owner/name@revision`, `models:/...` or `runs:/...`."""
    samples: str | None = None
    """Folder of `refine` to write as HDF5 in the paper's layout instead, with the refined labels for the original."""
    workers: PositiveInt = 2
    """HDF5 files written at a time."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad sample does to the job: stop it, or be counted and skipped."""
