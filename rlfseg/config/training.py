"""Settings of `train`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rlfseg.config.parts import (
    STRICT,
    BackboneConfig,
    Fraction,
    LoraConfig,
    Natural,
    OutFolder,
    Positive,
    PositiveInt,
    TrackingConfig,
)


@dataclass(config=STRICT, frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: Positive = 1e-4
    """Peak learning rate; not scaled by the number of workers. Paper: 1e-4 (Table 8)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Ours: the paper does not say."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Ours: the paper does not say."""
    clip: Positive | None = 1.0
    """Largest norm of the gradient; null: none. Ours: the paper does not say."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Course of the learning rate after warm-up. Ours: the paper does not say."""
    warmup_steps: Natural = 0
    """Steps of linear warm-up. Ours: the paper does not say."""
    fused: bool = True
    """One kernel for all weights instead of several for each. Ours."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SpeedConfig:
    """How a training step is computed; what it computes stays the same but for rounding. All ours."""

    gradient_checkpointing: bool = False
    """Compute the UNet's activations again in the backward pass instead of keeping them: less memory, more time."""
    compile: bool = False
    """Compile the UNet by `torch.compile`: minutes once, then faster steps. Meant for GPUs."""
    channels_last: bool = False
    """Keep the UNet's weights in the order that tensor cores take convolutions in. Meant for GPUs."""
    tf32: bool = True
    """Let a GPU round the factors of fp32 products to TF32; no effect on bf16 ones and on a CPU."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TrainConfig:
    """Trains an adapter by rectified flow with dynamic selection (Eq. 2, 4); no augmentation: the paper names none."""

    out: OutFolder
    """Folder to write the adapter, checkpoints, overlays and curves to; with several nodes one that all of them see."""
    latents: str | None = None
    """Folder written by `encode`; give this or `samples`."""
    samples: str | None = None
    """Folder written by `prepare` or `refine`: encode in the training loop, without a cache (slower)."""
    val_samples: str | None = None
    """Folder written by `prepare`, for validation during training; null: none."""
    val_images: PositiveInt = 32
    """Images of it to use, the first by the hash of their ids."""
    backbone: BackboneConfig = Field(default_factory=BackboneConfig)
    """The model to fine-tune; must be the one that encoded the latents."""
    lora: LoraConfig = Field(default_factory=LoraConfig)
    """What is trained."""
    init: str | None = None
    """Adapter to start from, of the same `lora` and base: a folder, such as a checkpoint, `tiny`, models:/name@alias or
    hf:owner/name@revision; null: from the base, as in the paper. Ours."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """How."""
    speed: SpeedConfig = Field(default_factory=SpeedConfig)
    """How fast, and in how much memory."""
    batch_size: PositiveInt = 8
    """Phrases that a worker computes at once. Paper: 8 (Table 8)."""
    accumulate: PositiveInt = 1
    """Batches of a worker in one step, one by one: a step is workers x batch_size x accumulate phrases. Ours."""
    epochs: PositiveInt = 10
    """Passes over the data. Paper: 10 (Table 8)."""
    max_steps: PositiveInt | None = None
    """Stop after this many steps; null: after the epochs."""
    selection: Literal["dynamic", "original", "refined"] = "dynamic"
    """The label that a sample learns from: the easier (Eq. 4), or always one of the two."""
    t_sampling: Literal["uniform", "one", "mixed"] = "uniform"
    """Times trained on: U(0, 1) as in the paper (3.2), only t = 1 (what one-step sampling uses), or half and half."""
    workers: PositiveInt = 1
    """Training processes, one GPU each where the device is a GPU. Paper: 8."""
    min_workers: PositiveInt | None = None
    """Fewest of them to go on with where nodes come and go; a step keeps its phrases. Null: always all of them."""
    cpus: Positive = 1.0
    """Logical CPUs that each of them reserves."""
    checkpoint_every: PositiveInt = 500
    """Steps between checkpoints."""
    validate_every: PositiveInt = 500
    """Steps between validations; each makes a checkpoint too, and the best of them becomes the adapter."""
    log_every: PositiveInt = 20
    """Steps between entries in MLflow."""
    storage: str | None = None
    """Folder or URI (s3://bucket/runs) for checkpoints, seen by all nodes; null: OUT/checkpoints."""
    keep: PositiveInt = 2
    """Best checkpoints to keep beside the newest; the last ones without validation."""
    max_failures: Natural = 3
    """Deaths of workers to survive by starting again from the newest checkpoint."""
    max_bad_steps: Natural = 10
    """Steps in a row that may be skipped because their gradient is not finite; one more ends the training. Ours."""
    seed: Natural = 42
    """Paper: 42 (Table 8)."""
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    """MLflow."""
