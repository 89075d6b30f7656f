"""Small trainings for tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlfseg.backbone import Backbone
from rlfseg.config import EVERY_LAYER, BackboneConfig, LoraConfig, OptimizerConfig, TrainConfig
from rlfseg.datasets.shapes import draw_scene
from rlfseg.images import image_to_tensor, mask_to_tensor
from rlfseg.training import Batch, TrainState

TINY = BackboneConfig(base="tiny", resolution=64, device="cpu")
LORA = LoraConfig(rank=4, targets=EVERY_LAYER)
FAST = OptimizerConfig(lr=2e-3, warmup_steps=0)


def make(lora: LoraConfig = LORA, total: int = 100, **settings: Any) -> TrainState:
    backbone = Backbone.load(settings.get("backbone", TINY))
    backbone.add_lora(lora)
    config = TrainConfig(**{"latents": "", "out": "", "backbone": TINY, "lora": lora, "optimizer": FAST} | settings)
    return TrainState(config, backbone, total_steps=total)


def drawn_batches() -> list[Batch]:
    """Four batches of two drawn scenes; the second of each has a refined label, its exact mask."""
    backbone = Backbone.load(TINY)
    scenes = [draw_scene(i) for i in range(8)]
    z1 = backbone.encode(torch.stack([image_to_tensor(s.image, 64) for s in scenes]))
    exact, coarse = (
        backbone.encode(torch.stack([mask_to_tensor(getattr(s.phrases[0], name), 64) for s in scenes]))
        for name in ("mask", "coarse")
    )
    has_refined = torch.arange(8) % 2 == 1
    refined = torch.where(has_refined[:, None, None, None], exact, coarse)
    parts = [slice(i, i + 2) for i in range(0, 8, 2)]
    return [
        Batch(
            ids=[f"scene-{i}" for i in range(8)][p],
            phrases=[s.phrases[0].caption for s in scenes][p],
            z1=z1[p],
            z0=coarse[p],
            z0_refined=refined[p],
            has_refined=has_refined[p],
        )
        for p in parts
    ]


def weights(state: TrainState) -> list[Tensor]:
    return [w.detach().clone() for w in state.weights]


def joined(parts: Sequence[Batch]) -> Batch:
    """Several batches as one."""
    return Batch(
        ids=[i for b in parts for i in b.ids],
        phrases=[p for b in parts for p in b.phrases],
        **{k: torch.cat([getattr(b, k) for b in parts]) for k in ("z1", "z0", "z0_refined", "has_refined")},
    )


def gradients(state: TrainState) -> Tensor:
    return torch.cat([w.grad.flatten() for w in state.weights if w.grad is not None])


def eight(batches: list[Batch], originals: int) -> Batch:
    """Eight phrases of which so many learn from the original label, whatever the network: the other is far away."""
    batch = joined(batches)
    easy = torch.arange(8) < originals
    far = torch.where(easy[:, None, None, None], 0.0, 100.0)
    return dataclasses.replace(
        batch, z0=batch.z0 + far, z0_refined=batch.z0 + (100 - far), has_refined=torch.ones(8, dtype=torch.bool)
    )
