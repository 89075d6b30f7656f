"""Settings of `refine` and `encode`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rlfseg.config.parts import STRICT, BackboneConfig, Fraction, Natural, OutFolder, PositiveInt, Ratio, WorkersConfig


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SamConfig:
    """The Segment Anything model that refines labels."""

    checkpoint: str = "tiny"
    """`tiny` (shipped, for drawn scenes) or an official .pth file."""
    model: Literal["vit_h", "vit_l", "vit_b"] | None = None
    """Architecture of the checkpoint; null: taken from its file name."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU where there is one."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class GuardConfig:
    """When a refined mask is distrusted and the original is kept."""

    min_iou: Fraction = 0.4
    """Least IoU of the refined mask with the original. Ours."""
    max_area_ratio: Ratio = 3.0
    """Largest factor by which the area may grow or shrink. Ours."""
    min_pixels: PositiveInt = 16
    """Objects smaller than this are not refined. Ours."""
    max_cover: Fraction = 0.98
    """Masks that cover more of the image than this are not refined. Ours."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class RefineConfig:
    """Refines labels with SAM (Eq. 3, Algorithm 1)."""

    samples: str
    """Folder written by `prepare`."""
    out: OutFolder
    """Folder to write refined masks to."""
    sam: SamConfig = Field(default_factory=SamConfig)
    """The SAM to use."""
    anchors: PositiveInt = 8
    """N of Eq. 3: points by k-means on the object. Ours: the paper gives no value."""
    max_rounds: PositiveInt = 8
    """T_max of Algorithm 1. Ours: the paper gives no value."""
    tau: Fraction = 0.98
    """Stop when two rounds' masks agree to this IoU (tau of Algorithm 1). Ours: the paper gives no value."""
    guard: GuardConfig = Field(default_factory=GuardConfig)
    """When to keep the original."""
    seed: Natural = 42
    """Seed of k-means. Paper: 42 (Table 8)."""
    run: WorkersConfig = Field(default_factory=WorkersConfig)
    """Actors, GPUs, batch size."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad sample does to the job: stop it, or be counted and skipped."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class EncodeConfig:
    """Encodes images and masks once into latents, for training."""

    samples: str
    """Folder written by `prepare`, or by `refine` for original and refined labels."""
    out: OutFolder
    """Folder to write latents to."""
    backbone: BackboneConfig = Field(default_factory=BackboneConfig)
    """The model whose autoencoder encodes."""
    run: WorkersConfig = Field(default_factory=WorkersConfig)
    """Actors, GPUs, batch size."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad sample does to the job: stop it, or be counted and skipped."""
