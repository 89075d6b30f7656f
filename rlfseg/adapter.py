"""The adapter folder: what training makes and everything else loads.

adapter_config.json, adapter_model.safetensors   peft's own, exact by `PeftModel.from_pretrained(pipe.unet, folder)`
or unet/                                         diffusers' own, after full fine-tuning
rlfseg.yaml                                      `Card`: base, resolution, calibration, figures, settings
README.md                                        the model card, for people
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from rlfseg.config import ASSETS, BackboneConfig, SamplingConfig
from rlfseg.errors import ModelError
from rlfseg.hub import download

if TYPE_CHECKING:  # drivers read cards and never a weight: diffusers and peft alone take ten seconds to import
    from rlfseg.backbone import Backbone

CARD = "rlfseg.yaml"
SEEN = 256  # values of a weight that its base's hash sees


@dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)
class Card:
    """What one must know to use an adapter rightly.

    Attributes:
        base: Reference of the base model, as in `BackboneConfig.base`.
        base_weights: `weights_hash` of its folder; empty in older cards: not checked.
        resolution: Side in pixels that it was trained at.
        full: Whether `unet/` replaces the base's UNet, instead of a LoRA.
        threshold: Score above which a pixel is mask; 0.5 until `calibrate` has run.
        eps_aos: Width of AOS's stable region (Eq. 6); None until `calibrate` has run.
        eps_hss: Width of HSS's stable region (Eq. 9); None until `calibrate` has run.
        data: What it was trained on: source, splits, counts, fingerprint.
        run_id: MLflow run of the training.
        metrics: Figures of the training on its validation pictures, at threshold 0.5.
        calibration: mIoU on the split of `calibrate`, at `threshold`: `one_step`, `aos`, `hss`.
        config: Resolved settings of the training.
    """

    base: str
    resolution: int
    base_weights: str = ""
    full: bool = False
    threshold: float = 0.5
    eps_aos: float | None = None
    eps_hss: float | None = None
    data: str = ""
    run_id: str = ""
    metrics: dict[str, float] = Field(default_factory=dict)
    calibration: dict[str, float] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)

    def eps(self, sampling: SamplingConfig) -> float | None:
        """Width of the stable region for a way of sampling: as its settings tell, else as calibrated, if it was."""
        calibrated = {"none": None, "aos": self.eps_aos, "hss": self.eps_hss}[sampling.rescale]
        return calibrated if sampling.eps is None else sampling.eps


def save(backbone: Backbone, folder: Path, card: Card) -> None:
    """Writes the trained weights, the card and the model card into `folder`.

    Args:
        backbone: Holds the trained UNet, with a LoRA or without.
        folder: Made where it is missing.
        card: What goes into `rlfseg.yaml`, beside the hash of the base's weights.

    Raises:
        ModelError: The weights are not what a plain UNet could load.
    """
    from peft import PeftModel

    folder.mkdir(parents=True, exist_ok=True)
    unet: Any = backbone.velocity.unet
    wrapped = [n for n, _ in unet.named_parameters() if {"module", "_orig_mod"} & set(n.split("."))]
    if wrapped:
        raise ModelError(f"adapter {folder}: keys such as {wrapped[0]} would load nowhere; unwrap the model first")
    if isinstance(unet, PeftModel):
        unet.save_pretrained(str(folder), safe_serialization=True)
    else:
        unet.save_pretrained(folder / "unet")
    write_card(folder, dataclasses.replace(card, base_weights=weights_hash(backbone.source)))


def write_card(folder: Path, card: Card) -> None:
    """Writes `rlfseg.yaml` and `README.md`, each in one move."""
    _replace(folder / CARD, yaml.safe_dump(dataclasses.asdict(card), sort_keys=False, allow_unicode=True))
    _replace(folder / "README.md", model_card(card))


def read_card(folder: Path) -> Card:
    """Reads and checks `rlfseg.yaml`.

    Args:
        folder: An adapter folder.

    Returns:
        The checked card.

    Raises:
        ModelError: It is missing or holds something else.
    """
    path = folder / CARD
    if not path.is_file():
        raise ModelError(f"{folder} is no adapter: {CARD} is missing")
    try:
        return TypeAdapter(Card).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path}: {error}") from error


def weights_hash(base: Path) -> str:
    """A short hash by which a base is told from another of the same shape, in milliseconds.

    Of each weight of the UNet and the autoencoder it sees the name, the shape and the first values, as fp16: a copy of
    the base in half precision is the same base.

    Args:
        base: A diffusers folder.

    Returns:
        12 hexadecimal digits.

    Raises:
        ModelError: A file of weights is damaged.
    """
    from safetensors import SafetensorError, safe_open

    sums = hashlib.sha256()
    files = [base / part / "diffusion_pytorch_model.safetensors" for part in ("unet", "vae")]
    for path in filter(Path.is_file, files):  # others of a very large base are not looked at
        try:
            with safe_open(path, framework="pt") as weights:
                for name in sorted(weights.keys()):
                    weight = weights.get_tensor(name)  # mapped, not read
                    sums.update(f"{path.parent.name}.{name} {list(weight.shape)}".encode())
                    sums.update(weight.flatten()[:SEEN].half().numpy().tobytes())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} can't be read: {error}") from error
    return sums.hexdigest()[:12]


def version(folder: Path) -> str:
    """A short hash of an adapter's weights, settings and card: what changes any mask changes it."""
    sums = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".yaml", ".json"):
            sums.update(path.read_bytes())
    return sums.hexdigest()[:12]


def resolve(reference: str, *, uri: str | None = None) -> Path:
    """The folder of an adapter, by the form of its reference.

    `tiny` is shipped; `models:/...` and `runs:/...` are downloaded from MLflow as files and never run;
    `hf:owner/name@revision` comes from the hub; anything else is a path.

    Args:
        reference: In any of these forms.
        uri: MLflow's; None: as `tracking.resolve_uri`.

    Returns:
        The folder that holds `rlfseg.yaml`.

    Raises:
        ModelError: There is none.
    """
    if reference == "tiny":
        folder = ASSETS / "adapter"
    elif reference.startswith(("models:/", "runs:/")):
        from rlfseg import tracking

        folder = tracking.download(reference, uri=uri)
    elif reference.startswith("hf:"):
        folder = download("adapter", reference, ["*.json", "*.yaml", "*.md", "*.safetensors"])
    else:
        folder = Path(reference)
    # An MLflow model holds the adapter as an artifact of its own, under the name that its folder had
    found = [f for f in (folder, folder / "adapter", *folder.glob("artifacts/*")) if (f / CARD).is_file()]
    if not found:
        lacks = f"holds no {CARD}" if folder.exists() else f"is no folder on {os.uname().nodename}"
        raise ModelError(
            f"adapter: {reference} {lacks}; give `tiny`, a folder written by `rlfseg train`, models:/name@alias, "
            "runs:/id/adapter or hf:owner/name@revision; on several nodes only `tiny` or a folder that all of them see"
        )
    return found[0]


def load(folder: Path, *, device: str = "auto", dtype: str = "auto", base_only: bool = False) -> tuple[Backbone, Card]:
    """The base with the adapter on it (or, with `base_only`, without), and its card.

    Args:
        folder: An adapter folder, see `resolve`.
        device: `auto`, `cpu` or `cuda`.
        dtype: `auto`, `fp32` or `bf16`.
        base_only: Leave the adapter off.

    Returns:
        The backbone in evaluation mode and the card.

    Raises:
        ModelError: Base or adapter can't be loaded, or don't fit each other.
    """
    from diffusers import UNet2DConditionModel

    from rlfseg.backbone import Backbone, first_of

    card = read_card(folder)
    config = BackboneConfig(base=card.base, resolution=card.resolution, device=device, dtype=dtype)  # type: ignore[arg-type]
    unet = None
    if card.full and not base_only:
        try:
            unet, info = UNet2DConditionModel.from_pretrained(
                folder / "unet", local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"adapter {folder / 'unet'} can't be loaded as a diffusers UNet: {error}") from error
        if info["missing_keys"]:
            raise ModelError(f"adapter {folder / 'unet'} lacks weights: {first_of(info['missing_keys'])}")
    backbone = Backbone.load(config, unet=unet)
    if card.base_weights and card.base_weights != (found := weights_hash(backbone.source)):
        raise ModelError(
            f"adapter {folder} was trained on another base than what {card.base} is here: its weights are {found}, "
            f"those of the adapter's base {card.base_weights}; give that base under this name, or train anew"
        )
    if not (card.full or base_only):
        backbone.load_lora(folder)
    return backbone, card


def export(folder: Path, out: Path) -> Path:
    """Writes `pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights` of diffusers, with its alpha and rank.

    Args:
        folder: An adapter folder.
        out: Folder to write to.

    Returns:
        The written file.

    Raises:
        ModelError: The adapter is a full UNet; diffusers reads that folder as it is.
    """
    from diffusers import StableDiffusionPipeline
    from peft import get_peft_model_state_dict

    card = read_card(folder)
    if card.full:
        raise ModelError(f"{folder / 'unet'} is a whole UNet already: UNet2DConditionModel.from_pretrained reads it")
    backbone, _ = load(folder, device="cpu", dtype="fp32")
    unet: Any = backbone.velocity.unet
    StableDiffusionPipeline.save_lora_weights(
        out,
        unet_lora_layers={k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(unet).items()},
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    return out / "pytorch_lora_weights.safetensors"


def model_card(card: Card) -> str:
    """The card as Markdown, with the front matter that model hubs read."""
    # A hub knows only its own names, and those without a revision
    hub = f"base_model: {card.base[3:].partition('@')[0]}\n" if card.base.startswith("hf:") else ""
    calibrated = "" if card.eps_aos is not None else " (not calibrated: run `rlfseg calibrate`)"
    lora = card.config.get("lora", {})
    rank = f", rank {lora['rank']}, alpha {lora.get('alpha') or lora['rank']}" if "rank" in lora else ""
    return f"""---
library_name: peft
{hub}tags: [image-segmentation, rectified-flow, lora]
---

# RLFseg adapter

Masks from words in one UNet step: a rectified flow from the latent of a {card.resolution} x {card.resolution} image
to its mask's.

| | |
|---|---|
| base | `{card.base}`, weights {card.base_weights or "not recorded"} |
| trained weights | {"all of the UNet" if card.full else f"LoRA{rank}"} |
| threshold | {card.threshold}{calibrated} |
| eps of AOS, HSS | {card.eps_aos}, {card.eps_hss} |
| training data | {card.data or "not recorded"} |
| MLflow run | {card.run_id or "none"} |

## Figures on the validation split

While it was trained, on a part of the split, at threshold 0.5:

{_table(card.metrics)}
By `rlfseg calibrate`, mIoU at threshold {card.threshold}:

{_table(card.calibration)}
## How to load

```python
from rlfseg import Segmenter

results = Segmenter.load("path/of/this/folder")("picture.png", ["red ring"])
results[0].mask  # uint8 {{0, 1}} [H, W]
```

## Settings

```yaml
{yaml.safe_dump(card.config, sort_keys=False).strip()}
```
"""


def _table(figures: dict[str, float]) -> str:
    rows = [f"| {name} | {value:.4f} |" for name, value in figures.items()] or ["| none yet | |"]
    return "\n".join(["| metric | value |", "|---|---|", *rows, ""])


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
