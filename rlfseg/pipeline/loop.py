"""One training process: resume, step, log, validate, keep. `train.py` has Ray Train run it on every worker."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
import ray.train
import torch
from ray.train import CheckpointUploadMode
from ray.train.torch import prepare_model
from torch import distributed

from rlfseg import draw, tracking
from rlfseg.adapter import Card
from rlfseg.backbone import Backbone
from rlfseg.config import TrainConfig, as_dict, without_passwords
from rlfseg.errors import BadSample, DataError, ResourceError, RlfsegError
from rlfseg.metrics import Sums
from rlfseg.pipeline.checkpoints import Store
from rlfseg.pipeline.cluster import hide_unreserved_gpus
from rlfseg.pipeline.curve import CURVE, append, spared
from rlfseg.pipeline.folders import alone, unseen, write_json
from rlfseg.pipeline.ingest import batches, steps_per_epoch
from rlfseg.pipeline.rows import Row
from rlfseg.pipeline.samples import LoadSample, askable, open_samples
from rlfseg.pipeline.sources import Source, open_source
from rlfseg.training import Batch, Labelled, TrainState

SHOWN = 4  # validation pictures on an overlay sheet
SCORE = "score"  # what the best checkpoints are chosen by
MEANS = ("loss", "lr", "grad_norm")  # over steps and phrases
SHOWN_FIGURES = (*MEANS, "chose_refined")
SKIPPED, LEFT_OUT = "skipped.jsonl", "left_out.json"
ORPHANS_S = 120.0  # that are waited for

logger = logging.getLogger(__name__)
T = TypeVar("T")
Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True, repr=False)  # Ray may show it, and passwords with it
class Job:
    """What every worker is told.

    Attributes:
        config: All settings, with absolute paths: Ray moves a worker's working directory.
        out: Folder of the training.
        storage: Folder or URI of the checkpoints.
        name: Of the training among them.
        total_steps: Steps of the whole training.
        data: What is trained on, for the adapter's card.
        uri: MLflow's address.
        run_id: The run; None where nothing is recorded.
        init: Folder of the adapter to start from.
    """

    config: TrainConfig
    out: Path
    storage: str
    name: str
    total_steps: int
    data: str
    uri: str
    run_id: str | None
    init: Path | None = None


class Stop(Exception):
    """Ends the training on all ranks at once, by an error that starting again would not mend."""

    def __init__(self, error: RlfsegError):
        super().__init__(str(error))
        self.error = error


def work(loop_config: Row) -> RlfsegError | None:
    """What Ray Train runs; returns an error on which all ranks agree, so that it isn't tried again."""
    job = loop_config["job"]
    try:
        # The other ranks wait for the first before they load anything
        with _without_orphans(job.out) if ray.train.get_context().get_world_rank() == 0 else nullcontext():
            Loop(job).run()
    except Stop as stop:
        return stop.error
    return None


@contextmanager
def _without_orphans(out: Path) -> Iterator[None]:
    """Waits for the workers of a driver that was killed, which may go on for a while.

    Not for ever: a lost node leaves the lock behind, on NFSv4 for a minute or two, on v3 until it is back.
    """
    with ExitStack() as held:
        try:
            if unseen(out) is None:  # else it would be made on this node
                held.enter_context(alone(out, "_lock-workers", wait=ORPHANS_S))
        except DataError:
            logger.warning("%s: workers of an earlier start, or of a lost node, still hold _lock-workers", out)
        yield


class Loop:
    """One training process.

    Args:
        job: What every worker is told.
    """

    def __init__(self, job: Job):
        hide_unreserved_gpus()
        config, context = job.config, ray.train.get_context()
        self.job, self.config = job, config
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.store = Store(job.storage, job.name)
        self._require_folders()
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
        self.source: Source = open_source(config)
        backbone = Backbone.load(config.backbone)
        backbone.add_lora(config.lora, seed=config.seed)
        self.state = TrainState(config, backbone, job.total_steps)
        self.recorded = tracking.Run.attach(job.uri, job.run_id if self.rank == 0 else None, default_dir=job.out)
        self.load = _watched_machine(job) if context.get_local_rank() == 0 else tracking.Run("")
        self.held_out, self.left_out = _held_out(config, self.rank, self.world)
        share = len(range(self.rank, config.workers, self.world)) / config.workers
        self.meter = Meter(self.recorded, config, job.out if self.rank == 0 else None, share, self._from_all)

    def run(self) -> None:
        """Trains from the newest whole checkpoint to the last step."""
        try:
            self._tell_left_out()
            self._resume()
            # A gradient's memory is the bucket's: one copy less. There are no buffers to send around
            settings = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
            self.state.model = prepare_model(self.state.backbone.velocity, parallel_strategy_kwargs=settings)
            if self.world > 1 or self.config.speed.compile:
                self.state.settle(self.config.batch_size)
            while self.state.step_number < self.job.total_steps:
                self._epoch()
        finally:
            self.load.end()
            self.recorded.end()

    def _require_folders(self) -> None:
        """Stops where a node doesn't see the folders that curve, overlays and checkpoints go to."""
        own = unseen(self.job.out) or self.store.unseen()
        if blind := next(filter(None, self._from_all(own)), None):
            raise Stop(blind)

    def _tell_left_out(self) -> None:
        """Writes down what can't be used of the validation samples, on whatever rank."""
        lines = [line for part in self._from_all(self.left_out) for line in part]
        if self.rank == 0:
            write_json(self.job.out / LEFT_OUT, {"validation": lines})
        if self.config.val_samples and not any(self._from_all(bool(self.held_out))):
            told = f": {lines[0]}" if lines else ""
            raise Stop(DataError(f"val_samples: {self.config.val_samples} holds nothing to validate on{told}"))

    def _resume(self) -> None:
        newest = next((c.path for c, _ in self.store.whole()), "") if self.rank == 0 else ""
        newest = self._from_rank_0(newest)
        if newest:
            with self.store.checkpoint(Path(newest).name).as_directory() as folder:
                self.state.load(Path(folder))
        elif self.job.init:
            self.state.backbone.load_weights(self.job.init)
        self.recorded.set_tags({"rlfseg.started_at_step": str(self.state.step_number)})

    def _epoch(self) -> None:
        state, config = self.state, self.config
        state.epoch, done = divmod(state.step_number, steps_per_epoch(self.source.counts, config))
        weight = self.world / (config.workers * config.accumulate)  # of a batch: ranks may have different numbers
        where = {"epoch": state.epoch, "rank": self.rank, "world": self.world, "start": done}
        for step in batches(self.source, state.backbone, config, **where):
            figures = state.step(*step, weight=weight)
            if figures["skipped"]:
                self._note_skipped(step, figures)
            self.meter.add(state.step_number, figures)
            last = state.step_number >= self.job.total_steps
            validate = last or state.step_number % config.validate_every == 0
            stop = state.bad_steps > config.max_bad_steps
            due = validate or state.step_number % config.checkpoint_every == 0
            # While no weight moves, a checkpoint would only push out an older one
            if last or stop or (due and not state.bad_steps):
                self._report(validate=validate)
            if stop:
                raise Stop(self._diverged(figures))
            if last:
                return

    def _report(self, *, validate: bool) -> None:
        """Validates on all ranks, saves on rank 0, tells Ray."""
        card, figures = _card(self.job), {}
        if validate and self.config.val_samples:
            figures = self._validate(card)
        card = replace(card, metrics=figures)
        step, error, checkpoint = self.state.step_number, None, None
        if self.rank == 0:
            try:
                checkpoint = self.store.keep(step, lambda folder: self.state.save(folder, card))
            except ResourceError as full:
                error = full
        if error := self._from_rank_0(error):
            raise Stop(error)
        if validate and self.rank == 0 and self.held_out:
            self._draw(card)
        score = figures.get("miou", -1.0) if self.config.val_samples else float(step)
        metrics = {"step": step, SCORE: score} | {f"val_{k}": v for k, v in figures.items()}
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)

    def _validate(self, card: Card) -> Figures:
        own, own_failed = self.state.validate(self.held_out, card)
        sums, failed = Sums(), 0
        for part, part_failed in self._from_all((own.to_dict(), own_failed)):
            sums.merge(Sums.from_dict(part))
            failed += part_failed
        figures = sums.results() | ({"failed": float(failed)} if failed else {})
        self.recorded.log_metrics({f"val/{k}": v for k, v in figures.items()}, self.state.step_number)
        return figures

    def _draw(self, card: Card) -> None:
        path = self.job.out / "overlays" / f"step-{self.state.step_number:07d}.png"
        sheet = _sheet(self.state, card, self.held_out)
        with spared(path):
            self.recorded.log_artifact(draw.save(path, sheet), "overlays")

    # --- steps that were skipped -------------------------------------------------------------------------------

    def _note_skipped(self, step: Sequence[Batch], figures: Figures) -> None:
        """Writes down the phrases of ranks whose loss is not finite; of all where that of none is, but a gradient."""
        parts = self._from_all(([i for b in step for i in b.ids], math.isfinite(figures["loss"])))
        bad = [own for own, is_finite in parts if not is_finite] or [own for own, _ in parts]
        ids = [i for own in bad for i in own]
        if self.rank == 0:
            append(self.job.out / SKIPPED, {"step": self.state.step_number, "phrases": ids})
        self.recorded.log_metrics({"train/skipped": 1.0}, self.state.step_number)

    def _diverged(self, figures: Figures) -> DataError:
        step, bad = self.state.step_number, self.state.bad_steps
        return DataError(
            f"step {step}: the gradient is {figures['grad_norm']} for {bad} steps in a row, more than max_bad_steps: "
            f"{self.config.max_bad_steps}; look at the phrases in {self.job.out / SKIPPED}, or train into another "
            "`out` with a lower optimizer.lr, and with `init` if not anew: the newest checkpoint in "
            f"{self.store.shown}/{self.job.name} has the weights as they were at step {step - bad} (the last whose "
            "gradient was finite), the one before those of a regular checkpoint"
        )

    # --- between ranks -----------------------------------------------------------------------------------------

    def _from_rank_0(self, value: T) -> T:
        if self.world == 1:
            return value
        box: list[Any] = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[no-any-return]

    def _from_all(self, value: T) -> list[T]:
        if self.world == 1:
            return [value]
        parts: list[Any] = [None] * self.world
        distributed.all_gather_object(parts, value)
        return parts


class Meter:
    """Averages the figures of a few steps over all ranks, for MLflow and for the driver, which shows how far we are.

    Args:
        recorded: Where they go.
        config: Settings.
        out: Folder of the training; None on all ranks but the first.
        share: Part of a step's phrases that is this rank's.
        from_all: Collects a value from all ranks.
    """

    def __init__(
        self,
        recorded: tracking.Run,
        config: TrainConfig,
        out: Path | None,
        share: float,
        from_all: Callable[[Figures], list[Figures]],
    ):
        self.recorded, self.out, self.share, self.from_all = recorded, out, share, from_all
        self.every, self.phrases = config.log_every, config.workers * config.batch_size * config.accumulate
        self.rows: list[Figures] = []
        self.start = time.monotonic()

    def add(self, step: int, figures: Figures) -> None:
        """Takes one step's figures; skipped steps don't count."""
        self.rows.append(figures)
        if step % self.every:
            return
        if len(self.rows) == self.every:  # fewer after a resume between two entries: no mean of what one stands for
            self._log(step)
        self.rows, self.start = [], time.monotonic()

    def _log(self, step: int) -> None:
        parts = self.from_all(self._own())
        total = {k: math.fsum(p[k] for p in parts) for k in parts[0]}
        chosen, refined = total.pop("chosen"), total.pop("refined")
        speed = len(self.rows) * self.phrases / (time.monotonic() - self.start)
        row = total | ({"chose_refined": chosen / refined} if refined else {})
        row |= {"samples_per_second": speed, "workers": float(len(parts))}
        self.recorded.log_metrics({f"train/{k}": v for k, v in row.items()}, step)
        if self.out:
            append(self.out / CURVE, {"step": step, **row})

    def _own(self) -> Figures:
        """This rank's part of each mean, and its counts of labels."""
        good = [r for r in self.rows if not r["skipped"]]
        counts = {
            "chosen": sum(r["chose_refined"] * r["refined"] for r in good),
            "refined": sum(r["refined"] for r in good),
        }
        return counts | {k: self.share * sum(r[k] for r in good) / len(good) for k in MEANS if good}


def _watched_machine(job: Job) -> tracking.Run:
    """The training's run, kept open for the load of this node: the driver knows only its own machine's."""
    node = ray.get_runtime_context().get_node_id()[:8]
    return tracking.Run.attach(job.uri, job.run_id, node=node, default_dir=job.out)


def _held_out(config: TrainConfig, rank: int, world: int) -> tuple[list[Labelled], list[str]]:
    """This rank's share of the fixed validation pictures, and what is left out of it, as lines for the user."""
    found, left_out = list[Labelled](), list[str]()
    if config.val_samples is None:
        return found, left_out
    samples = open_samples(config.val_samples)
    load = LoadSample(samples.folder)
    for row in samples.rows.slice(0, config.val_images).to_pylist()[rank::world]:
        try:
            sample = load(row)
        except BadSample as error:
            left_out.append(f"left out of validation: {error}")
            continue
        captions, masks = sample["captions"], sample["labels"]
        asked = askable(captions)
        if asked:
            phrases, truth = [captions[n] for n in asked], np.stack([masks[n] for n in asked])
            found.append(Labelled(image=sample["image"], phrases=phrases, masks=truth))
        if empty := len(captions) - len(asked):
            left_out.append(f"left out of validation: {empty} empty phrases of {row['id']}")
    return found, left_out


def _sheet(state: TrainState, card: Card, held_out: list[Labelled]) -> np.ndarray:
    segmenter, cells = state.segmenter(card), []
    for sample in held_out[:SHOWN]:
        results = segmenter.segment([sample.image], [sample.phrases])[0]
        found = [np.zeros_like(true) if r.failed else r.mask for r, true in zip(results, sample.masks, strict=True)]
        cells.append([
            draw.overlay(sample.image, list(sample.masks), list(sample.phrases)),
            draw.overlay(sample.image, found, list(sample.phrases)),
        ])  # fmt: skip
    return draw.contact_sheet(cells, titles=["label", f"step {state.step_number}"])


def _card(job: Job) -> Card:
    config = job.config
    return Card(
        base=config.backbone.base,
        resolution=config.backbone.resolution,
        full=config.lora.full,
        data=job.data,
        run_id=job.run_id or "",
        config=without_passwords(as_dict(config)),
    )
