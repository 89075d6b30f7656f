"""One training: the state that a step changes, and how it is saved, loaded and validated. Runs in a plain process."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn

from rlfseg import adapter, flow
from rlfseg.adapter import Card
from rlfseg.backbone import Backbone
from rlfseg.config import OptimizerConfig, SamplingConfig, TrainConfig, as_dict
from rlfseg.errors import ModelError
from rlfseg.metrics import Sums
from rlfseg.segmenter import Segmenter

STATE = "state.pt"
PROGRESS = "progress.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Cached latents of B phrases.

    Attributes:
        ids: One id a phrase, unique in the data set; the time t is drawn by it.
        phrases: The captions.
        z1: Image latents.
        z0: Latents of the original masks.
        z0_refined: Latents of the refined masks; the original's where there is none.
        has_refined: Which phrases have a refined mask.
    """

    ids: Sequence[str]
    phrases: Sequence[str]
    z1: Float[Tensor, "B C h w"]
    z0: Float[Tensor, "B C h w"]
    z0_refined: Float[Tensor, "B C h w"]
    has_refined: Bool[Tensor, " B"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Labelled:
    """A picture, uint8 RGB [H, W, 3], with phrases and their true masks, uint8 {0, 1} [n, H, W], for validation."""

    image: NDArray[np.uint8]
    phrases: Sequence[str]
    masks: NDArray[np.uint8]


class TrainState:
    """Backbone, optimizer and position of one training process.

    Args:
        config: All settings.
        backbone: With the trainable weights on it already.
        total_steps: Steps of the whole training, for the schedule.

    Attributes:
        model: The velocity model as it is called with gradient; wrap it for data parallelism.
        step_number: Optimizer steps done.
        epoch: Number of the current epoch.
    """

    def __init__(self, config: TrainConfig, backbone: Backbone, total_steps: int):
        self.config, self.backbone, self.total_steps = config, backbone, total_steps
        self.model: nn.Module = backbone.velocity
        self.weights = backbone.trainable()
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(self.weights, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)
        self.step_number, self.epoch = 0, 0

    def step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step on one batch; afterwards the figures of this process.

        Args:
            batch: Latents and phrases of this process.

        Returns:
            `loss`; `chose_refined`, the share of the phrases with a refined label that learned from it; `lr`;
            `grad_norm` before clipping.
        """
        lr = learning_rate(self.config.optimizer, self.step_number, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses, chose_refined = self._losses(batch)
        loss = losses.mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.weights, self.config.optimizer.clip or math.inf)
        self.optimizer.step()
        self.step_number += 1
        refined = int(batch.has_refined.sum())
        return {
            "loss": loss.item(),
            "chose_refined": int(chose_refined.sum()) / refined if refined else 0.0,
            "lr": lr,
            "grad_norm": norm.item(),
        }

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        device, config = self.backbone.device, self.config
        z1, z0, z0_refined = (z.to(device, torch.float32) for z in (batch.z1, batch.z0, batch.z0_refined))
        has_refined = batch.has_refined.to(device)
        if config.selection == "original":
            has_refined = torch.zeros_like(has_refined)
        elif config.selection == "refined":
            z0, has_refined = z0_refined, torch.zeros_like(has_refined)  # one label is left: nothing to select
        t = flow.sample_time(config.t_sampling, config.seed, self.epoch, batch.ids).to(device)
        with self.backbone.autocast():
            text = self.backbone.text(batch.phrases)
            return flow.selection_loss(
                self.model, z1, z0, z0_refined, t, text, has_refined=has_refined, v_frozen=self.backbone.velocity
            )

    def validate(self, samples: Iterable[Labelled], card: Card) -> Sums:
        """Sums of all measures of one-step masks at original size, threshold as in the card."""
        sums, segmenter = Sums(), Segmenter(self.backbone, card)
        for sample in samples:
            results = segmenter.segment([sample.image], [sample.phrases], sampling=SamplingConfig())[0]
            for result, mask in zip(results, sample.masks, strict=True):
                sums.add(result.score, mask, result.threshold)
        return sums

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def save(self, folder: Path, card: Card) -> None:
        """Writes adapter, optimizer and position; everything else follows from the config."""
        adapter.save(self.backbone, folder, card)
        torch.save({"optimizer": self.optimizer.state_dict()}, folder / STATE)
        progress = {"step": self.step_number, "epoch": self.epoch, "config": as_dict(self.config)}
        (folder / PROGRESS).write_text(json.dumps(progress, indent=1))

    def load(self, folder: Path) -> None:
        """Goes on from a folder that `save` wrote.

        Args:
            folder: Written by `save`.

        Raises:
            ModelError: It is damaged or belongs to another training.
        """
        try:
            progress = json.loads((folder / PROGRESS).read_text())
            state = torch.load(folder / STATE, map_location=self.backbone.device, weights_only=True)
            self.backbone.load_weights(folder)
            self.optimizer.load_state_dict(state["optimizer"])
        except (OSError, EOFError, RuntimeError, ValueError, KeyError, UnpicklingError) as error:
            raise ModelError(f"checkpoint {folder} can't be read: {error}") from error
        self.step_number, self.epoch = progress["step"], progress["epoch"]


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of a step: linear warm-up, then constant or cosine to zero; pure, so that resuming is exact."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.lr * warmup
    done = max(0, step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
