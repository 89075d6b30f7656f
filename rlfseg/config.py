"""Every setting of every command: frozen dataclasses, one a command, with the paper's values where it gives them.

Each field says what it means, its unit, and where its default comes from; "ours" marks what the paper leaves open.
Imports neither torch nor ray, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid")
PositiveInt = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Ratio = Annotated[float, Field(ge=1)]

ASSETS = Path(__file__).parent / "assets"  # the drawn world's weights
SD_V15 = "hf:stable-diffusion-v1-5/stable-diffusion-v1-5"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
EVERY_LAYER = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_in", "conv_out")


# --- parts that several commands share ---------------------------------------------------------------------------


@dataclass(config=STRICT, frozen=True, kw_only=True)
class BackboneConfig:
    """The latent diffusion model that is fine-tuned."""

    base: str = SD_V15
    """`tiny` (shipped), a diffusers folder, or `hf:owner/name@revision`. Paper: Stable Diffusion v1.5 (A.3.3)."""
    resolution: Annotated[int, Field(ge=16, le=4096)] = 512
    """Side in pixels to which images and masks are stretched. Paper: 512 (Table 8)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU where there is one."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the frozen parts and autocast; LoRA weights are always fp32. `auto`: bf16 on a GPU, else fp32."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class LoraConfig:
    """Which weights of the UNet are trained."""

    rank: PositiveInt = 64
    """Rank of the update. Paper: 64 (Table 6, 8)."""
    alpha: Positive | None = None
    """Scale is alpha / rank; null means alpha = rank. Ours: the paper does not say."""
    targets: tuple[str, ...] = ATTENTION
    """Names of the layers to adapt, as peft matches them: the end of a module's name. Ours: the paper does not say."""
    full: bool = False
    """Train all weights of the UNet instead of LoRA (the paper's Table 6, last row)."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class WorkersConfig:
    """How a stage is spread over the cluster."""

    workers: PositiveInt = 1
    """Actors that hold a model, or tasks at a time where there is no model."""
    cpus: Positive = 1.0
    """Logical CPUs that each of them reserves."""
    gpus: Annotated[float, Field(ge=0)] | None = None
    """GPUs that each reserves; null: 1 where the device is a GPU, else 0."""
    loaders: PositiveInt = 1
    """CPU tasks that read and decode beside them."""
    batch_size: PositiveInt = 8
    """Images a call."""
    memory_gb: Positive = 0.5
    """Memory that each loader reserves, in GiB."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SamplingConfig:
    """How a mask's latent is reached from the image's."""

    steps: PositiveInt = 1
    """Euler steps from t = 1 to 0. Paper: 1 (Table 9)."""
    rescale: Literal["none", "aos", "hss"] = "none"
    """Rescale the single step by adaptive one-step sampling (Eq. 6-7) or hybrid step sampling (Eq. 8-10)."""
    eps: Positive | None = None
    """Width of the stable region; null: the adapter's own, set by `calibrate`. Ours: the paper gives no value."""
    gamma_max: Positive | None = 0.25
    """Upper limit of gamma; null: none, as in the paper. Ours: dark pictures drive gamma to 1 and spoil the mask."""
    hss_steps: Annotated[int, Field(ge=2)] = 5
    """K of hybrid step sampling. Paper: 5 (A.2)."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TrackingConfig:
    """Where MLflow records the run."""

    uri: str | None = None
    """MLflow tracking URI: sqlite:///ABSOLUTE/PATH or a server; null: $MLFLOW_TRACKING_URI, else sqlite in ./runs."""
    experiment: str = "rlfseg"
    """Name of the experiment."""
    run_name: str | None = None
    """Name of the run; null: the output folder's name."""
    enabled: bool = True
    """Record at all."""


# --- commands ----------------------------------------------------------------------------------------------------


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ShapesConfig:
    """Drawn scenes."""

    count: PositiveInt = 1000
    """Scenes to draw."""
    split: Literal["train", "val", "test"] = "train"
    """Scenes of different splits are independent, and none was seen by the shipped weights."""
    labels: Literal["exact", "coarse"] = "exact"
    """Exact masks, or polygon-like ones as human annotators draw them."""
    phrases: PositiveInt = 3
    """Phrases a scene at most."""
    size: Annotated[int, Field(ge=32, le=1024)] = 64
    """Side of a scene in pixels."""
    seed: Natural = 42
    """Seed of the world."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class PrepareConfig:
    """Writes a data set as HDF5 shards in the paper's layout (A.3.2), with an index."""

    out: str
    """Folder to write shards and index to."""
    source: Literal["shapes", "folder"] = "shapes"
    """`shapes` draws scenes; `folder` reads images with mask PNGs and a list of phrases."""
    path: str | None = None
    """For `folder`: a JSON, JSONL or CSV list of phrases, or the folder of index.json, phrases.jsonl or phrases.csv."""
    splits: tuple[str, ...] = ()
    """For `folder`: keep only images whose `split` is one of these; empty: all."""
    shapes: ShapesConfig = Field(default_factory=ShapesConfig)
    """For `shapes`: what to draw."""
    images_per_shard: PositiveInt = 500
    """Images in one HDF5 file."""
    workers: PositiveInt = 2
    """Shards written at a time."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad sample does to the job: stop it, or be counted and skipped."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SamConfig:
    """The Segment Anything model that refines labels."""

    checkpoint: str = "tiny"
    """`tiny` (shipped, for drawn scenes) or an official .pth file."""
    model: Literal["vit_h", "vit_l", "vit_b", "tiny"] | None = None
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
    out: str
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
    out: str
    """Folder to write latents to."""
    backbone: BackboneConfig = Field(default_factory=BackboneConfig)
    """The model whose autoencoder encodes."""
    run: WorkersConfig = Field(default_factory=WorkersConfig)
    """Actors, GPUs, batch size."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad sample does to the job: stop it, or be counted and skipped."""


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


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TrainConfig:
    """Trains an adapter by rectified flow with dynamic selection (Eq. 2, 4)."""

    latents: str
    """Folder written by `encode`."""
    out: str
    """Folder to write the adapter, checkpoints, overlays and curves to."""
    val_samples: str | None = None
    """Folder written by `prepare`, for validation during training; null: none."""
    val_images: PositiveInt = 32
    """Images of it to use, the first by the hash of their ids."""
    backbone: BackboneConfig = Field(default_factory=BackboneConfig)
    """The model to fine-tune; must be the one that encoded the latents."""
    lora: LoraConfig = Field(default_factory=LoraConfig)
    """What is trained."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """How."""
    batch_size: PositiveInt = 8
    """Phrases a worker and step. Paper: 8 (Table 8)."""
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
    cpus: Positive = 1.0
    """Logical CPUs that each of them reserves."""
    checkpoint_every: PositiveInt = 500
    """Steps between checkpoints."""
    validate_every: PositiveInt = 500
    """Steps between validations."""
    log_every: PositiveInt = 20
    """Steps between entries in MLflow."""
    max_failures: Natural = 3
    """Deaths of workers to survive by starting again from the last checkpoint."""
    seed: Natural = 42
    """Paper: 42 (Table 8)."""
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    """MLflow."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class CalibrateConfig:
    """Chooses the mask threshold and the eps of AOS and HSS on a validation split and writes them into the adapter."""

    adapter: str
    """Adapter folder; calibration is written into it."""
    samples: str
    """Folder written by `prepare`: a validation split, never the test split."""
    out: str
    """Folder to write the search's results to."""
    eps: tuple[Positive, ...] = (0.05, 0.1, 0.2, 0.4, 0.8)
    """Values to try."""
    gamma_max: Positive | None = 0.25
    """Upper limit of gamma; null: none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU where there is one."""
    run: WorkersConfig = Field(default_factory=WorkersConfig)
    """Actors, GPUs, batch size."""
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    """MLflow."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class EvaluateConfig:
    """Measures an adapter, or masks already made, against a test split at original size."""

    samples: str
    """Folder written by `prepare`, with the true masks."""
    out: str
    """Folder to write results.json, a table, curves and overlays to."""
    adapter: str | None = None
    """Adapter to measure: `tiny`, a folder, `hf:owner/name@revision`, `models:/...` or `runs:/...`."""
    predictions: str | None = None
    """Masks to measure instead: a folder written by `predict`, `refine` or `prepare`."""
    base_only: bool = False
    """Measure the adapter's base without the adapter."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    """How masks are sampled."""
    threshold: Fraction | None = None
    """Score above which a pixel is mask; null: the adapter's own, set by `calibrate`."""
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


@dataclass(config=STRICT, frozen=True, kw_only=True)
class PredictConfig:
    """Masks for phrases on many pictures."""

    images: str
    """A picture, a folder, a glob, a Parquet file with columns `path` and `phrases`, or a folder of `prepare`."""
    out: str
    """Folder to write Parquet with masks as COCO RLE to, and PNGs and overlays on request."""
    phrases: tuple[str, ...] = ()
    """Phrases to ask of every picture; may be empty where each picture brings its own."""
    phrases_file: str | None = None
    """A text file with a phrase a line, added to `phrases`."""
    adapter: str = "tiny"
    """`tiny`, a folder, `hf:owner/name@revision`, `models:/...` or `runs:/...`."""
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    """How masks are sampled."""
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
    on_error: Literal["stop", "skip"] = "skip"
    """What a bad picture does to the job: stop it, or be reported and skipped."""


# --- configs as data ---------------------------------------------------------------------------------------------


def as_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dicts and lists, ready for JSON and YAML."""
    return json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[no-any-return]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"lora": {"rank": 64}}` -> `{"lora.rank": 64}`, as MLflow's parameters are."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def digest(tree: dict[str, Any]) -> str:
    """A short hash of a config, for names and for resuming only what is the same."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]
