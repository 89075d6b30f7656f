"""Models of the released sizes with random weights: time and memory don't depend on what the weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rlfseg import adapter
from rlfseg.backbone import Backbone
from rlfseg.config import ASSETS, BackboneConfig, LoraConfig


def write_base(folder: Path) -> None:
    """Writes a base of SD v1.5's size with random weights, and in `tiny` an AutoencoderTiny of TAESD's."""
    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    widths = (128, 256, 512, 512)
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        "vae": AutoencoderKL(
            down_block_types=down, up_block_types=up, block_out_channels=widths, layers_per_block=2, sample_size=512
        ),
        "tiny": AutoencoderTiny(),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
        ),
    }
    for name, part in parts.items():
        part.half().save_pretrained(folder / name)
    # The words don't matter; SD's own tokenizer would have to be downloaded
    CLIPTokenizer.from_pretrained(ASSETS / "base" / "tokenizer", model_max_length=77).save_pretrained(
        folder / "tokenizer"
    )


def write_adapter(folder: Path, *, base: Path, resolution: int) -> None:
    """An adapter as of a training, with random weights: `adapter.load` refuses one that changes nothing.

    Args:
        folder: Made where it is missing.
        base: A diffusers folder.
        resolution: Side of the squares that it takes, in pixels.
    """
    where = str(base.absolute())
    backbone = Backbone.load(BackboneConfig(base=where, resolution=resolution, device="cpu"))
    backbone.add_lora(LoraConfig(rank=64))
    for weight in backbone.trainable():
        torch.nn.init.normal_(weight, std=1e-3)
    adapter.save(backbone, folder, adapter.Card(base=where, resolution=resolution))


def random_sam(name: str) -> Sam:
    """An official architecture (`vit_b`, `vit_l`, `vit_h`) with random weights."""
    torch.manual_seed(0)
    sam: Sam = sam_model_registry[name]()
    return sam
