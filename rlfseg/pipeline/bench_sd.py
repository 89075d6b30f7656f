"""`rlfseg bench sd`: what SD v1.5's full size costs at 512 px: seconds, memory, and the share of the card's peak.

The architecture with random weights: time and memory don't depend on what the weights are. On a CPU each figure is of
one call, since it takes minutes; on a GPU of the median of the rounds.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from rlfseg.adapter import Card
from rlfseg.backbone import Backbone
from rlfseg.config import BackboneConfig, BenchConfig, FastConfig, LoraConfig, TrainConfig
from rlfseg.datasets.shapes import draw_scene
from rlfseg.device import choose_device
from rlfseg.pipeline import baselines
from rlfseg.pipeline.bench import Row
from rlfseg.pipeline.timing import Way, peak_memory, race, seconds
from rlfseg.segmenter import Segmenter
from rlfseg.training import Batch, TrainState

SIDE = 512
PHRASES = ("red ring", "a blue star", "small cross", "the green circle on the left")
PAPER_SECONDS = 0.19  # for an image with one phrase on an RTX 3090
GOAL_SECONDS = 0.10
BATCHES = (1, 2, 4, 8, 16, 32, 64)
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "L4": 121e12, "3090": 71e12, "4090": 165e12}
"""Dense bf16 matrix products in FLOP a second by a part of the card's name, from its maker; SXM where kinds differ."""
SHARES = {"A100": 0.30}  # of the peak, to reach; any other card
OTHERS = 0.20


def measure(config: BenchConfig) -> list[Row]:
    """All rows of the suite.

    Args:
        config: Settings of the command.

    Returns:
        Rows in the order in which they are shown.
    """
    on_gpu, side = choose_device("auto") == "cuda", 128 if config.quick else SIDE
    with tempfile.TemporaryDirectory(dir=config.out, prefix="sd-") as made:
        baselines.write_base(Path(made))
        backbone = Backbone.load(BackboneConfig(base=made, resolution=side))
        rows = prediction(backbone, config, on_gpu)
        if on_gpu:
            rows.append(share(backbone, config.rounds))
        return [*rows, *training_step(Path(made), side, config, on_gpu)]


def prediction(backbone: Backbone, config: BenchConfig, on_gpu: bool) -> list[Row]:
    """A whole image with 1 and with 4 phrases: decode no file, but encode, UNet, decode, resize.

    Args:
        backbone: Without an adapter.
        config: Settings of the command.
        on_gpu: Whether there is one.

    Returns:
        Seconds and memory of each.
    """
    side = backbone.resolution
    backbone.fuse()
    fast = FastConfig(compile=on_gpu, max_batch=4)
    segmenter = Segmenter(backbone, Card(base="", resolution=side), max_batch=fast.max_batch, compile=fast.compile)
    image, rows = draw_scene(0, split="test", size=side).image, list[Row]()
    for count in (1, 4):
        way = partial(segmenter, image, PHRASES[:count])
        named = f"one image of {side} px with {count} phrase{'s' * (count > 1)}"
        goal = GOAL_SECONDS if on_gpu and count == 1 and side == SIDE else None
        rows += _costs(named, way, config, on_gpu, goal)
    return rows


def training_step(base: Path, side: int, config: BenchConfig, on_gpu: bool) -> list[Row]:
    """A step of LoRA 64 from cached latents with the paper's batch of 8, or on a CPU with one sample.

    Args:
        base: A diffusers folder.
        side: Side of the pictures in pixels.
        config: Settings of the command.
        on_gpu: Whether there is one.

    Returns:
        Seconds and memory.
    """
    count, lora = 8 if on_gpu else 1, LoraConfig(rank=64)
    backbone = Backbone.load(BackboneConfig(base=str(base), resolution=side))
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
    named = f"a training step of {count} x {side} px from cached latents"
    return _costs(named, partial(state.step, batch), config, on_gpu, None)


def _costs(name: str, way: Way, config: BenchConfig, on_gpu: bool, goal: float | None) -> list[Row]:
    if on_gpu:
        [taken], memory = race(way, rounds=config.rounds), peak_memory(way)
    else:
        taken, memory = 0.0, 0

        def timed() -> None:
            nonlocal taken
            taken = seconds(way)

        memory = peak_memory(timed)
    weights = torch.cuda.memory_allocated() if on_gpu else 0
    rows = [
        Row(
            name=name,
            ours=taken,
            baseline=goal,
            ratio=goal / taken if goal else None,
            goal=1 if goal else None,
            unit="s",
        )
    ]
    gib = (memory + weights) / 2**30
    what = "peak memory" if on_gpu else "memory beyond the weights"
    return [*rows, Row(name=f"{name}: {what}", ours=gib, baseline=None, ratio=None, goal=None, unit="GiB")]


def share(backbone: Backbone, rounds: int) -> Row:
    """The UNet's share of the card's matrix peak in bf16, at the batch size where it is largest.

    Args:
        backbone: On a GPU.
        rounds: How often each size is measured.

    Returns:
        The row: FLOP a second against the peak.
    """
    card = torch.cuda.get_device_name()
    known = next((kind for kind in PEAKS if kind in card), None)
    velocity, side, best, at = torch.compile(backbone.velocity, dynamic=False), backbone.resolution // 8, 0.0, 0
    for count in BATCHES:
        z, t, text = torch.randn(count, 4, side, side), torch.ones(count), torch.randn(count, 77, 768)
        given = [x.to("cuda") for x in (z, t, text)]
        with torch.no_grad():
            with FlopCounterMode(display=False) as counter:
                backbone.velocity(*given)
            [taken] = race(partial(velocity, *given), rounds=rounds)
        if (rate := counter.get_total_flops() / taken) > best:
            best, at = rate, count
    peak = PEAKS[known] if known else None
    return Row(
        name=f"UNet at {backbone.resolution} px in bf16, batch {at}, share of the peak of {card}",
        ours=best / 1e12,
        baseline=peak / 1e12 if peak else None,
        ratio=best / peak if peak else None,
        goal=SHARES.get(known or "", OTHERS),
        unit="TFLOP/s",
    )
