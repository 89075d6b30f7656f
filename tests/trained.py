"""Small trainings for tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlfseg.backbone import Backbone
from rlfseg.config import EVERY_LAYER, BackboneConfig, LoraConfig, OptimizerConfig, TrainConfig
from rlfseg.training import Batch, TrainState

TINY = BackboneConfig(base="tiny", resolution=64, device="cpu")
LORA = LoraConfig(rank=4, targets=EVERY_LAYER)
FAST = OptimizerConfig(lr=2e-3, warmup_steps=0)


def make(lora: LoraConfig = LORA, total: int = 100, **settings: Any) -> TrainState:
    backbone = Backbone.load(settings.get("backbone", TINY))
    backbone.add_lora(lora)
    config = TrainConfig(**{"latents": "", "out": "", "backbone": TINY, "lora": lora, "optimizer": FAST} | settings)
    return TrainState(config, backbone, total_steps=total)


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
