"""`rlfseg bench model`: inference, training, selection and refinement against what one writes with others' libraries.

On a base of SD v1.5's size with random weights, or with `quick` on the drawn world's. On a CPU the pictures are smaller
than 512, which leaves the ratios about as they are: all parts grow with the pixels, attention a little more.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlfseg import flow, images
from rlfseg.adapter import Card
from rlfseg.backbone import Backbone
from rlfseg.config import ASSETS, BackboneConfig, BenchConfig, GuardConfig, LoraConfig, RefineConfig, TrainConfig
from rlfseg.datasets.shapes import draw_scene
from rlfseg.device import choose_device
from rlfseg.hub import TINY_AUTOENCODER
from rlfseg.metrics import iou
from rlfseg.pipeline import baselines, random_models
from rlfseg.pipeline.bench import Row
from rlfseg.pipeline.refine import Refiner
from rlfseg.pipeline.timing import Way, peak_memory, race
from rlfseg.sam import SamModel
from rlfseg.segmenter import Segmenter
from rlfseg.training import Batch, TrainState

PHRASES = ("red ring", "a blue star", "small cross", "the green circle on the left")
CHOOSERS = 7  # samples of a step of selection, of which one learns from the original: 14 %
LORA = LoraConfig(rank=64)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured on.

    Attributes:
        name: For the table.
        base: A diffusers folder.
        tiny: An AutoencoderTiny that fits it.
        inference: Side of the pictures in pixels, for inference.
        training: For a training step, with `batch` samples.
        selection: For a step of selection, with CHOOSERS samples.
        batch: Samples of a training step.
        device: `cpu` or `cuda`.
        rounds: How often each way is measured.
    """

    name: str
    base: Path
    tiny: Path
    inference: int
    training: int
    selection: int
    batch: int
    device: str
    rounds: int

    def backbone(self, resolution: int) -> Backbone:
        """Freshly loaded."""
        return Backbone.load(BackboneConfig(base=str(self.base), resolution=resolution))


def measure(config: BenchConfig) -> Iterator[Row]:
    """All rows of the suite.

    Args:
        config: Settings of the command.

    Yields:
        Rows in the order in which they are shown.
    """
    with tempfile.TemporaryDirectory(dir=config.out, prefix="model-") as made:
        subject = _subject(config, Path(made))
        yield from inference(subject)
        yield training(subject)
        yield from selection(subject)
        yield from refinement(config)


def _subject(config: BenchConfig, folder: Path) -> Subject:
    device = choose_device("auto")
    drawn = Subject(
        name="drawn world's base",
        base=ASSETS / "base",
        tiny=TINY_AUTOENCODER,
        inference=64,
        training=64,
        selection=64,
        batch=8,
        device=device,
        rounds=config.rounds,
    )
    if config.quick:
        return drawn
    random_models.write_base(folder)
    large = replace(drawn, name="SD v1.5's size", base=folder, tiny=folder / "tiny")
    if device == "cpu":
        return replace(large, inference=256, training=256, selection=128, batch=2)
    return replace(large, inference=512, training=512, selection=512)


def _row(name: str, ours: float, baseline: float, goal: float | None, unit: str = "s") -> Row:
    return Row(name=name, ours=ours, baseline=baseline, ratio=baseline / ours, goal=goal, unit=unit)


# --- inference -------------------------------------------------------------------------------------------------------


def inference(subject: Subject) -> list[Row]:
    """Four phrases on one image, against one after the other: the same masks, and those of a tiny autoencoder.

    Args:
        subject: What to measure on.

    Returns:
        A row each.
    """
    side = subject.inference
    image = draw_scene(0, split="test", size=side).image
    plain = baselines.Pipeline(subject.base, side, subject.device)
    backbone, card = subject.backbone(side), Card(base=str(subject.base), resolution=side)
    backbone.fuse()
    approximate = copy(backbone)  # the same networks but for the autoencoder
    approximate.use_tiny(str(subject.tiny))
    numbers = itertools.count()

    def anew(way: Callable[[Sequence[str]], object]) -> Way:
        """With phrases that no call has seen: a segmenter keeps the states of those that it knows."""
        return lambda: way([f"{phrase} {next(numbers)}" for phrase in PHRASES])

    def by_loop(phrases: Sequence[str]) -> list[NDArray[np.float32]]:
        """Scores float32 [H, W] of each phrase, one after the other."""
        return [plain(image, phrase) for phrase in phrases]

    exact, quick = (partial(Segmenter(own, card), image) for own in (backbone, approximate))
    far = [np.abs(r.score - score).mean() for r, score in zip(exact(PHRASES), by_loop(PHRASES), strict=True)]
    if max(far) > (1e-5 if subject.device == "cpu" else 2e-2):  # bf16 rounds otherwise in other batches
        raise AssertionError(f"scores differ by {max(far)} in the mean")
    loop, ours, by_tiny = race(anew(by_loop), anew(exact), anew(quick), rounds=subject.rounds)
    name = f"4 phrases on a {side} px image, {subject.name}, against diffusers a phrase"
    return [_row(name, ours, loop, 1.15), _row(f"{name}, by AutoencoderTiny", by_tiny, loop, 4.0)]


# --- training --------------------------------------------------------------------------------------------------------


def training(subject: Subject) -> Row:
    """A step from cached latents, against one that encodes image, mask and phrase as diffusers' LoRA script does.

    Args:
        subject: What to measure on.

    Returns:
        The row.
    """
    side, count = subject.training, subject.batch
    script = _script(subject, side)
    scenes = [draw_scene(n, split="test", size=side) for n in range(count)]
    pixels = torch.stack([images.image_to_tensor(s.image, side) for s in scenes])
    masks = torch.stack([images.mask_to_tensor(s.phrases[0].mask, side) for s in scenes])
    captions = [s.phrases[0].caption for s in scenes]
    state = _state(subject, side, "original", "uniform")
    z1, z0 = state.backbone.encode(pixels).cpu(), state.backbone.encode(masks).cpu()
    batch = _batch(captions, z1, z0, z0, refined=False)
    pixels, masks = (x.to(script.pipeline.device, script.pipeline.dtype) for x in (pixels, masks))
    numbers = itertools.count()

    def step() -> dict[str, float]:
        """With phrases that no cache holds: in an epoch of PhraseCut hardly one is met again in time."""
        return state.step(replace(batch, phrases=[f"{c} {next(numbers)}" for c in captions]))

    by_script, ours = race(partial(script.step, pixels, masks, captions), step, rounds=subject.rounds)
    name = f"training step from cached latents, {count} x {side} px, {subject.name}, against encoding in the loop"
    return Row(
        name=name, ours=count / ours, baseline=count / by_script, ratio=by_script / ours, goal=2.0, unit="samples/s"
    )


def _script(subject: Subject, side: int) -> baselines.LoraScript:
    pipeline = baselines.Pipeline(subject.base, side, subject.device)
    return baselines.LoraScript(pipeline, rank=LORA.rank, targets=LORA.targets)


def _state(
    subject: Subject, side: int, selection: Literal["original", "dynamic"], times: Literal["uniform", "one"]
) -> TrainState:
    backbone = subject.backbone(side)
    backbone.add_lora(LORA)
    config = TrainConfig(out="none", latents="none", lora=LORA, selection=selection, t_sampling=times)
    return TrainState(config, backbone, total_steps=10**6)


def _batch(captions: Sequence[str], z1: Tensor, z0: Tensor, z0_refined: Tensor, *, refined: bool) -> Batch:
    return Batch(
        ids=[str(n) for n in range(len(captions))],
        phrases=captions,
        z1=z1,
        z0=z0,
        z0_refined=z0_refined,
        has_refined=torch.full((len(captions),), refined),
    )


# --- selection -------------------------------------------------------------------------------------------------------


def selection(subject: Subject) -> list[Row]:
    """Dynamic selection (Eq. 4), against both losses in full: at times between 0 and 1, and at t = 1.

    Args:
        subject: What to measure on.

    Returns:
        Time and memory at times between, and time at t = 1.
    """
    side, rows = subject.selection, []
    script = _script(subject, side)
    settings: list[tuple[Literal["uniform", "one"], float]] = [("uniform", 1.15), ("one", 1.7)]
    for times, goal in settings:
        state = _state(subject, side, "dynamic", times)
        naive, ours = _selection_ways(script, state)
        figures = state.step(*ours.args)
        if not np.isclose(figures["chose_refined"], 1 - 1 / CHOOSERS):
            raise AssertionError(f"{figures['chose_refined']} of the labels were chosen refined")
        name = f"selection, 1 of {CHOOSERS} originals, t {times}, {side} px, {subject.name}, against two losses in full"
        by_naive, by_us = race(naive, ours, rounds=subject.rounds)
        rows.append(_row(name, by_us, by_naive, goal))
        if times == "uniform":
            less, more = (peak_memory(way) / 2**30 for way in (ours, naive))
            rows.append(_row(f"peak memory of it, {subject.name}", less, more, 1.0, "GiB"))
    return rows


def _selection_ways(script: baselines.LoraScript, state: TrainState) -> tuple[Way, partial[dict[str, float]]]:
    """The same step in both ways, of made-up latents: one label of each sample is plainly the easier."""
    noise = torch.Generator().manual_seed(0)
    backbone = state.backbone
    shape = backbone.encode(torch.zeros(1, 3, backbone.resolution, backbone.resolution)).shape[1:]
    z1, easy, apart = (torch.randn(CHOOSERS, *shape, generator=noise) for _ in range(3))
    hard = easy + 3 * apart
    chosen = (torch.arange(CHOOSERS) == 0).view(-1, 1, 1, 1)
    captions = [f"phrase {n}" for n in range(CHOOSERS)]
    batch = _batch(captions, z1, torch.where(chosen, easy, hard), torch.where(chosen, hard, easy), refined=True)
    t = flow.sample_time(state.config.t_sampling, state.config.seed, 0, batch.ids)
    z1, z0, z0_refined, t = (x.to(script.pipeline.device) for x in (z1, batch.z0, batch.z0_refined, t))
    with torch.no_grad():
        text = script.pipeline.text(captions)
    return partial(script.step_of_two_losses, z1, z0, z0_refined, t, text), partial(state.step, batch)


# --- refinement ------------------------------------------------------------------------------------------------------


def refinement(config: BenchConfig) -> list[Row]:
    """Five masks of an image through SAM, against `SamPredictor`, whose image is set for each mask or once.

    Args:
        config: Settings of the command.

    Returns:
        Two rows with the drawn world's SAM; without `quick` two more of an official size with random weights.
    """
    device = choose_device("auto")
    torch.backends.cuda.matmul.allow_tf32 = False  # as `refine` has it; the training before has turned it on
    settings = RefineConfig(
        samples="none", out="none", guard=GuardConfig(min_iou=0, max_area_ratio=1e9, min_pixels=1, max_cover=1)
    )
    rows = _refinement("the drawn world's SAM", SamModel.load(settings.sam), settings, 128, config.rounds)
    if config.quick:
        return rows
    # Random weights don't settle: a fixed number of rounds
    size, settings = ("vit_h" if device == "cuda" else "vit_b"), replace(settings, max_rounds=3, tau=1.0)
    sam = SamModel(random_models.random_sam(size), device)
    return [*rows, *_refinement(f"{size} with random weights, 3 rounds", sam, settings, 512, config.rounds)]


def _refinement(name: str, sam: SamModel, settings: RefineConfig, side: int, rounds: int) -> list[Row]:
    image, masks = _five(side)
    refiner = Refiner(settings, sam)
    row = dict.fromkeys(("shard", "height", "width", "captions", "n_phrases", "bytes")) | {"id": "0"}
    row |= {"image": image, "labels": masks, "instances": [m[None] for m in masks]}
    plain = partial(
        baselines.refine,
        sam.sam,
        image,
        masks,
        anchors=settings.anchors,
        rounds=settings.max_rounds,
        tau=settings.tau,
        seed=settings.seed,
    )
    ours, each, once = partial(refiner, [row]), partial(plain, again=True), partial(plain, again=False)
    found = [images.rle_decode(rle, (side, side)) for rle in refiner([row])[0]["masks"]]
    same = np.mean([iou(a, b) for a, b in zip(found, once(), strict=True)])
    if same < 0.95:  # SamPredictor rounds the resized picture to whole grey levels
        raise AssertionError(f"masks agree to an IoU of {same}")
    by_each, by_once, by_us = race(each, once, ours, rounds=rounds)
    named = f"5 masks of an image, {name}, against SamPredictor with set_image"
    return [_row(f"{named} a mask", by_us, by_each, 3.0), _row(f"{named} once", by_us, by_once, 1.3)]


def _five(side: int) -> tuple[NDArray[np.uint8], list[NDArray[np.uint8]]]:
    """A drawn scene with five objects' coarse labels, from as many scenes as that takes."""
    image, masks = draw_scene(0, split="test", size=side).image, list[NDArray[np.uint8]]()
    for n in range(20):
        masks += [p.coarse for p in draw_scene(n, split="test", size=side).phrases if p.coarse.sum() > 64]
    return image, masks[:5]
