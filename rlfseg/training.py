"""One training: the state that a step changes, and how it is saved, loaded and validated. Runs in a plain process."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rlfseg import adapter, flow
from rlfseg.adapter import Card
from rlfseg.backbone import Backbone
from rlfseg.config import (
    FastConfig,
    OptimizerConfig,
    SamplingConfig,
    SpeedConfig,
    TrainConfig,
    as_dict,
    without_passwords,
)
from rlfseg.errors import ModelError
from rlfseg.metrics import Sums
from rlfseg.segmenter import Segmenter

STATE = "state.pt"
PROGRESS = "progress.json"
# What a training may be resumed with another value of: it changes no weight, or only their last bits
FREE = {
    *("out", "latents", "samples", "val_samples", "init", "storage", "keep", "tracking"),
    *("log_every", "checkpoint_every", "max_failures", "max_bad_steps", "min_workers", "cpus", "speed"),
}


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
        bad_steps: Steps skipped in a row up to now, because their gradient was not finite.
    """

    def __init__(self, config: TrainConfig, backbone: Backbone, total_steps: int):
        self.config, self.backbone, self.total_steps = config, backbone, total_steps
        self.model: nn.Module = backbone.velocity
        self.weights = backbone.trainable()
        speed_up(backbone, config.speed)
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, fused=o.fused
        )
        self.step_number, self.epoch, self.bad_steps = 0, 0, 0

    def step(self, *batches: Batch, weight: float | None = None) -> dict[str, float]:
        """One optimizer step; where the gradient of any process is not finite, no weight moves in any of them.

        Args:
            *batches: Latents and phrases of this process, computed one after the other.
            weight: Of each batch's mean loss. Default: one step of the mean of them all. Under data parallelism,
                processes with different numbers of batches pass processes / all batches.

        Returns:
            Figures of this process: `loss`; `refined`, the number of phrases with a refined label; `chose_refined`, the
            share of them that learned from it, 0 where there is none; `lr`; `grad_norm` before clipping, of all
            processes; `skipped`, 1 if no weight moved.
        """
        lr = learning_rate(self.config.optimizer, self.step_number, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        told: list[Tensor] = []
        for number, batch in enumerate(batches, 1):
            with self._synced(last=number == len(batches)):
                losses, chose_refined = self._losses(batch)
                mean = losses.mean()
                (mean * (weight or 1 / len(batches))).backward()
            told += [mean.detach(), chose_refined.sum()]
        told.append(nn.utils.clip_grad_norm_(self.weights, self.config.optimizer.clip or math.inf))
        *figures, norm = torch.stack([x.float() for x in told]).tolist()  # read at once: each waits for the GPU's queue
        loss, chosen = sum(figures[::2]) / len(batches), int(sum(figures[1::2]))
        refined = sum(int(batch.has_refined.sum()) for batch in batches)
        if math.isfinite(norm):
            self.optimizer.step()
        self.bad_steps = 0 if math.isfinite(norm) else self.bad_steps + 1
        self.step_number += 1
        return {
            "loss": loss,
            "refined": float(refined),
            "chose_refined": chosen / refined if refined else 0.0,
            "lr": lr,
            "grad_norm": norm,
            "skipped": float(self.bad_steps > 0),
        }

    def settle(self, size: int) -> None:
        """Computes a gradient that is thrown away, for the processes of a DistributedDataParallel and for a compiler.

        After the first one DistributedDataParallel lays out its buckets anew, and three or more processes sum a number
        in another order at another place: the first step after a restart would differ in last bits from what it was.
        A compiler takes the second size that it sees for one of many: the calls with a gradient are all of one size.

        Args:
            size: Latents a batch, as in all steps: `speed.compile` compiles for this one.
        """
        side = self.config.backbone.resolution // self.backbone.factor
        z = torch.zeros(size, self.backbone.vae.config.latent_channels, side, side, device=self.backbone.device)
        with self.backbone.autocast():
            mean = self.model(z, z.new_ones(size), self.backbone.text([""] * size)).mean()
        mean.backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _synced(self, last: bool) -> AbstractContextManager[object]:
        """Gradients travel between processes once a step, with its last batch."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        device, config = self.backbone.device, self.config
        of_batch = (batch.z1, batch.z0, batch.z0_refined)
        z1, z0, z0_refined = (z.to(device, torch.float32, non_blocking=True) for z in of_batch)
        has_refined = known = batch.has_refined.to(device, non_blocking=True)
        if config.selection == "original":
            has_refined = torch.zeros_like(has_refined)
        elif config.selection == "refined":
            z0, has_refined = z0_refined, torch.zeros_like(has_refined)  # one label is left: nothing to select
        t = flow.sample_time(config.t_sampling, config.seed, self.epoch, batch.ids).to(device, non_blocking=True)
        with self.backbone.autocast():
            text = self.backbone.text(batch.phrases)
            losses, chose_refined = flow.selection_loss(
                self.model,
                z1,
                z0,
                z0_refined,
                t,
                text,
                has_refined=has_refined,
                v_frozen=self.backbone.velocity,
                few_calls=device != "cpu",
            )
        return losses, known if config.selection == "refined" else chose_refined

    def validate(self, samples: Iterable[Labelled], card: Card) -> tuple[Sums, int]:
        """Sums of all measures of one-step masks at original size, threshold as in the card.

        Args:
            samples: Pictures and their true masks.
            card: Of the adapter.

        Returns:
            The sums, and for how many phrases the network gave NaN, which count as an empty mask.
        """
        sums, failed, segmenter = Sums(), 0, self.segmenter(card)
        for sample in samples:
            results = segmenter.segment([sample.image], [sample.phrases], sampling=SamplingConfig())[0]
            for result, mask in zip(results, sample.masks, strict=True):
                failed += result.failed
                sums.add(np.zeros(mask.shape, np.float32) if result.failed else result.score, mask, result.threshold)
        return sums, failed

    def segmenter(self, card: Card) -> Segmenter:
        """With the weights as they are now; beside a training that has a GPU's memory it takes few phrases at once."""
        return Segmenter(self.backbone, card, max_batch=min(FastConfig().max_batch, self.config.batch_size))

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def save(self, folder: Path, card: Card) -> None:
        """Writes adapter, optimizer and position; schedule, samples and times follow from them and the config.

        Args:
            folder: Made where it is missing.
            card: What goes into the adapter.

        Raises:
            OSError: It can't be written, on a full disk for example.
        """
        try:
            adapter.save(self.backbone, folder, card)
        except SafetensorError as error:
            raise OSError(f"{folder} can't be written: {error}") from error
        state = io.BytesIO()  # torch's own writer turns a full disk into a RuntimeError without its reason
        torch.save({"optimizer": self.optimizer.state_dict()}, state)
        (folder / STATE).write_bytes(state.getbuffer())
        position = {"step": self.step_number, "epoch": self.epoch, "bad_steps": self.bad_steps}
        config = without_passwords(as_dict(self.config))
        (folder / PROGRESS).write_text(json.dumps(position | {"config": config}, indent=1))

    def load(self, folder: Path) -> None:
        """Goes on from a folder that `save` wrote.

        Args:
            folder: Written by `save`.

        Raises:
            ModelError: It is damaged or belongs to another training; then nothing has changed.
        """
        try:
            progress = json.loads((folder / PROGRESS).read_text())
            then, now = binding(progress["config"]), binding(as_dict(self.config))
            if fields := sorted(k for k in {*then, *now} if then.get(k) != now.get(k)):
                told = "; ".join(f"{k} ({then.get(k)!r} then, {now.get(k)!r} now)" for k in fields)
                raise ModelError(f"checkpoint {folder} belongs to a training with other settings: {told}")
            state = torch.load(folder / STATE, map_location=self.backbone.device, weights_only=True)
            self.backbone.load_weights(folder)
            self.optimizer.load_state_dict(state["optimizer"])
            self._lay_out_moments()
        except ModelError:
            raise
        except (OSError, EOFError, RuntimeError, ValueError, KeyError, UnpicklingError) as error:
            raise ModelError(f"checkpoint {folder} can't be read: {error}") from error
        self.step_number, self.epoch, self.bad_steps = (progress[k] for k in ("step", "epoch", "bad_steps"))

    def _lay_out_moments(self) -> None:
        """Puts each moment into its weight's order in memory, which `speed.channels_last` may have changed.

        Fused AdamW pairs the two by position in memory, whatever their strides say.
        """
        for weight, state in self.optimizer.state.items():
            state |= {k: torch.empty_like(weight).copy_(m) for k, m in state.items() if m.shape == weight.shape}


def binding(config: dict[str, Any]) -> dict[str, Any]:
    """Those settings, of a TrainConfig as a dict, that the trained weights depend on beyond their last bits.

    Of `batch_size` and `accumulate` that is their product: it alone decides on a step's phrases.
    """
    own = {k: v for k, v in config.items() if k not in FREE}
    return own | {"batch_size x accumulate": own.pop("batch_size") * own.pop("accumulate")}


def speed_up(backbone: Backbone, config: SpeedConfig) -> None:
    """Applies the settings to the UNet, in place: no wrapper, so that the names of its weights stay as they are."""
    unet: Any = backbone.velocity.unet
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.channels_last:
        unet.to(memory_format=torch.channels_last)
    if config.compile:
        backbone.velocity.compile()
    if backbone.device != "cpu":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of a step: linear warm-up, then constant or cosine to zero; pure, so that resuming is exact."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.lr * warmup
    done = max(0, step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
