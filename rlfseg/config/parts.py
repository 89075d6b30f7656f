"""What several commands share, and a config as plain data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

STRICT = ConfigDict(extra="forbid")
PositiveInt = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Ratio = Annotated[float, Field(ge=1)]


def _local(folder: str) -> str:
    """Refuses what `Path` would take for a folder of that name here."""
    if "://" in folder:
        raise PydanticCustomError("url", "a URL; give a local or mounted folder")
    return folder


OutFolder = Annotated[str, AfterValidator(_local)]

ASSETS = Path(__file__).parents[1] / "assets"  # the drawn world's weights
SD_V15 = "hf:stable-diffusion-v1-5/stable-diffusion-v1-5"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
USER_INFO = re.compile(r"(\w://)[^/@\s]*(?::[^@\s]*)?@")  # of a URI; SQLAlchemy takes a slash in a password
EVERY_LAYER = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_in", "conv_out")


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
    """Memory that each loader reserves, in GiB. `predict`: a picture of 20 megapixels takes 0.3, one of 64 takes 0.9;
    overlays of 20 megapixels take 0.5, and 0.06 more for each phrase beyond the first. Where labels are read: twice
    batch_size pictures with all their masks."""


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

    @property
    def idle(self) -> tuple[str, ...]:
        """What is set without effect, as lines for the user."""
        wasted = self.eps is not None and self.rescale == "none"
        return (f"sampling.eps: {self.eps} has no effect with sampling.rescale: none",) if wasted else ()


@dataclass(config=STRICT, frozen=True, kw_only=True)
class FastConfig:
    """How masks are computed faster; only `autoencoder` changes them by more than rounding. All ours."""

    autoencoder: str | None = None
    """An AutoencoderTiny instead of the base's own, faster and less exact (docs/inference.md): `tiny` (shipped, for
    drawn scenes), a folder, or `hf:owner/name@revision`; null: none."""
    compile: bool = False
    """Compile by `torch.compile`, on a GPU into CUDA graphs; batches are padded to a few sizes. Costs minutes first."""
    max_batch: PositiveInt = 32
    """Most phrases, of any pictures, in one call of the UNet; bounds a GPU's memory, whatever is asked."""


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


# --- configs as data ---------------------------------------------------------------------------------------------


def as_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dicts and lists, ready for JSON and YAML."""
    return json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[no-any-return]


def without_passwords(tree: Any) -> Any:
    """A text, or a tree of plain values, whose URIs have lost their user names and passwords: for others to read."""
    if isinstance(tree, dict):
        return {key: without_passwords(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_passwords(value) for value in tree]
    return USER_INFO.sub(r"\1", tree) if isinstance(tree, str) else tree


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"lora": {"rank": 64}}` -> `{"lora.rank": 64}`, as MLflow's parameters are."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def digest(tree: dict[str, Any]) -> str:
    """A short hash of a config, for names and for resuming only what is the same."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]
