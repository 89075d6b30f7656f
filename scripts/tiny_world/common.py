"""What the four trainings of the drawn world share: scenes in memory, a schedule, averaged weights, a log."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rlfseg.datasets.shapes import Scene, draw_scene

HELD_OUT = 10_000_000  # scenes of the split "tiny" from this number on are never trained on


@dataclass(frozen=True)
class Draw:
    """Picklable `index -> scene`."""

    size: int = 64

    def __call__(self, index: int) -> Scene:
        """Scene `index` of the split "tiny"."""
        return draw_scene(index, split="tiny", size=self.size)


def scenes(count: int, *, held_out: bool = False) -> list[Scene]:
    """Draws `count` scenes of the split "tiny" on all cores; held-out ones are disjoint from the others."""
    start = HELD_OUT if held_out else 0
    with multiprocessing.Pool() as pool:
        return pool.map(Draw(), range(start, start + count), chunksize=64)


def parser(doc: str, minutes: float, default_out: str) -> argparse.ArgumentParser:
    """Flags that every script has."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", type=Path, default=Path(default_out), help="folder to write the weights and log.jsonl to")
    p.add_argument("--minutes", type=float, default=minutes, help="wall-clock time to train for")
    p.add_argument("--scenes", type=int, default=12000, help="drawn scenes to train on")
    p.add_argument("--threads", type=int, default=2, help="CPU threads")
    p.add_argument("--seed", type=int, default=42)
    return p


class Clock:
    """A training of fixed wall-clock length: yields steps and sets a warm-up and cosine learning rate by time."""

    def __init__(self, optimizer: torch.optim.Optimizer, lr: float, minutes: float, warmup_steps: int = 100):
        self.optimizer, self.lr, self.seconds, self.warmup_steps = optimizer, lr, minutes * 60, warmup_steps
        self.start = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def __iter__(self) -> Iterator[int]:
        step = 0
        while self.elapsed < self.seconds:
            done = self.elapsed / self.seconds
            lr = self.lr * min(1.0, (step + 1) / self.warmup_steps) * (0.5 + 0.5 * math.cos(math.pi * done) + 0.01)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            yield step
            step += 1


class Average:
    """Exponential moving average of a module's trainable weights."""

    def __init__(self, module: nn.Module, decay: float = 0.995):
        self.module, self.decay = module, decay
        self.weights = {k: v.detach().clone() for k, v in module.named_parameters() if v.requires_grad}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the module's present weights; early steps weigh more."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for k, v in self.module.named_parameters():
            if k in self.weights:
                self.weights[k].lerp_(v, 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Writes the averaged weights into a module of the same architecture."""
        for k, v in module.named_parameters():
            if k in self.weights:
                v.copy_(self.weights[k])


class Log:
    """Lines of JSON in `out/log.jsonl`, and on the screen."""

    def __init__(self, out: Path):
        out.mkdir(parents=True, exist_ok=True)
        self.file = (out / "log.jsonl").open("w")

    def __call__(self, **row: object) -> None:
        """Writes one line; floats are rounded."""
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()


def to_unit(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def mask_to_unit(masks: np.ndarray) -> torch.Tensor:
    """uint8 {0, 1} [B, H, W] -> float32 [B, 3, H, W] in {-1, 1}."""
    return torch.from_numpy(masks).float()[:, None].expand(-1, 3, -1, -1) * 2 - 1


def mean_iou(score: torch.Tensor, mask: torch.Tensor) -> float:
    """Mean over samples of the IoU of `score > 0.5` and `mask`, both [B, H, W]."""
    a, b = (score > 0.5).flatten(1), (mask > 0.5).flatten(1)
    union = (a | b).sum(1)
    return float(torch.where(union > 0, (a & b).sum(1) / union.clamp(min=1), torch.ones(())).mean())
