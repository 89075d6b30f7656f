"""`rlfseg bench sd`: what SD v1.5's full size costs at 512 px: seconds, memory, and the share of the card's peak.

The architecture with random weights: time and memory don't depend on what the weights are. On a CPU each figure is of
one call after a first, since it takes long; on a GPU of the median of the rounds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rlfseg.adapter import Card
from rlfseg.backbone import Backbone
from rlfseg.config import BackboneConfig, BenchConfig, FastConfig, LoraConfig, TrainConfig
from rlfseg.datasets.shapes import draw_scene
from rlfseg.device import choose_device
from rlfseg.errors import ResourceError
from rlfseg.pipeline import random_models
from rlfseg.pipeline.bench import Row
from rlfseg.pipeline.timing import Way, high_water, race, seconds
from rlfseg.segmenter import Segmenter
from rlfseg.training import Batch, TrainState

SIDE = 512
PHRASES = ("red ring", "a blue star", "small cross", "the green circle on the left")
GOAL_SECONDS = 0.10  # for an image with one phrase; the paper: 0.19 on an RTX 3090
BATCHES = (1, 2, 4, 8, 16, 32, 64)
PEAKS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "3090": 71e12,
    "4090": 165e12,
}
"""Dense bf16 matrix products in FLOP a second by a part of the card's name, from its maker; SXM where kinds differ."""
SHARES = {"A100": 0.30}  # of the peak, to reach; any other card
OTHERS = 0.20


def measure(config: BenchConfig) -> Iterator[Row]:
    """All rows of the suite, each of a process of its own: what another left behind counts for nothing.

    Args:
        config: Settings of the command.

    Yields:
        Rows in the order in which they are shown.
    """
    on_gpu, side = choose_device("auto") == "cuda", 128 if config.quick else SIDE
    batch = 8 if on_gpu else 1  # the paper's, or one sample on a CPU
    with (
        tempfile.TemporaryDirectory(dir=config.out, prefix="sd-") as made,
        ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as fresh,
    ):
        random_models.write_base(Path(made))
        cost = fresh.submit(training_step, made, side, batch, config.rounds).result()
        yield from _rows(f"a training step of {batch} x {side} px from cached latents", cost, None)
        if on_gpu:
            yield fresh.submit(share, made, side, config.rounds).result()
        for count in (1, 4):
            goal = GOAL_SECONDS if on_gpu and count == 1 and side == SIDE else None
            cost = fresh.submit(prediction, made, side, count, config.rounds).result()
            yield from _rows(f"one image of {side} px with {count} phrase{'s' * (count > 1)}", cost, goal)


def prediction(base: str, side: int, count: int, rounds: int) -> Cost:
    """A whole image with some phrases: decode no file, but encode, UNet, decode, resize.

    Args:
        base: A diffusers folder.
        side: Side of the picture in pixels.
        count: Phrases.
        rounds: How often it is measured on a GPU.

    Returns:
        What it costs.
    """
    backbone = Backbone.load(BackboneConfig(base=base, resolution=side))
    backbone.fuse()
    fast = FastConfig(compile=backbone.device != "cpu", max_batch=4)
    segmenter = Segmenter(backbone, Card(base="", resolution=side), max_batch=fast.max_batch, compile=fast.compile)
    image = draw_scene(0, split="test", size=side).image
    return _cost(partial(segmenter, image, PHRASES[:count]), rounds)


def training_step(base: str, side: int, count: int, rounds: int) -> Cost:
    """A step of LoRA 64 from cached latents.

    Args:
        base: A diffusers folder.
        side: Side of the pictures in pixels.
        count: Samples.
        rounds: How often it is measured on a GPU.

    Returns:
        What it costs.
    """
    lora = LoraConfig(rank=64)
    backbone = Backbone.load(BackboneConfig(base=base, resolution=side))
    backbone.add_lora(lora)
    state = TrainState(TrainConfig(out="", latents="", lora=lora), backbone, total_steps=10**6)
    z1, z0 = torch.randn(2, count, 4, side // 8, side // 8)
    batch = Batch(
        ids=[str(n) for n in range(count)],
        phrases=["red ring"] * count,
        z1=z1,
        z0=z0,
        z0_refined=z0,
        has_refined=torch.zeros(count, dtype=torch.bool),
    )
    return _cost(partial(state.step, batch), rounds)


class Cost(NamedTuple):
    """Of one call: seconds, and the most bytes that its process held, weights included.

    On a CPU with its libraries; on a GPU what torch had reserved there, without CUDA's own memory.
    """

    seconds: float
    bytes: int


def _cost(way: Way, rounds: int) -> Cost:
    if torch.cuda.is_available():
        way()  # after compiling, a second call records CUDA graphs; the race drops one more
        way()
        [taken] = race(way, rounds=rounds)
        return Cost(taken, torch.cuda.max_memory_reserved())  # what replays of CUDA graphs use is in it
    way()  # what is made at the first call doesn't count
    return Cost(seconds(way), high_water())


def _rows(name: str, cost: Cost, goal: float | None) -> list[Row]:
    ratio, least = (goal / cost.seconds, 1.0) if goal else (None, None)
    return [
        Row(name=name, ours=cost.seconds, baseline=goal, ratio=ratio, goal=least, unit="s"),
        Row(name=f"{name}: peak memory", ours=cost.bytes / 2**30, baseline=None, ratio=None, goal=None, unit="GiB"),
    ]


def share(base: str, resolution: int, rounds: int) -> Row:
    """The UNet's share of the card's matrix peak in bf16 at the batch size that is best, compiled or not.

    Args:
        base: A diffusers folder.
        resolution: Side of the pictures in pixels.
        rounds: How often each size is measured.

    Returns:
        The row: FLOP a second against the peak.
    """
    backbone = Backbone.load(BackboneConfig(base=base, resolution=resolution))
    backbone.fuse()
    card = torch.cuda.get_device_name()
    known = next((kind for kind in PEAKS if kind in card), None)
    side = backbone.resolution // 8

    def given(count: int) -> list[Tensor]:
        """z, t and text of a batch of so many."""
        parts = torch.randn(count, 4, side, side), torch.ones(count), torch.randn(count, 77, 768)
        return [part.to("cuda") for part in parts]

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone.velocity(*given(1))
    flops = float(counter.get_total_flops())  # of one sample: they grow with the batch exactly

    def rate(velocity: Callable[..., object], count: int) -> float:
        """FLOP a second with a batch of so many."""
        with torch.no_grad():
            [taken] = race(partial(velocity, *given(count)), rounds=rounds)
        return flops * count / taken

    rates: dict[int, float] = {}
    for count in BATCHES:
        with suppress(torch.OutOfMemoryError):  # of a small card: larger ones are not its best
            rates[count] = rate(backbone.velocity, count)
    if not rates:
        raise ResourceError(f"bench sd: the memory of {card} takes no UNet of SD v1.5 at {resolution} px")
    at = max(rates, key=rates.__getitem__)
    with suppress(torch.OutOfMemoryError):
        rates[at] = max(rates[at], rate(torch.compile(backbone.velocity, dynamic=False), at))
    best = rates[at]
    peak = PEAKS[known] if known else None
    return Row(
        name=f"UNet at {backbone.resolution} px in bf16, batch {at}, share of the peak of {card}",
        ours=best / 1e12,
        baseline=peak / 1e12 if peak else None,
        ratio=best / peak if peak else None,
        goal=SHARES.get(known or "", OTHERS),
        unit="TFLOP/s",
    )
