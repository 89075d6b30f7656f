"""Train: `TorchTrainer` around `training.TrainState`. Cached latents in, an adapter out, resumed at the very step."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model

from rlfseg import adapter, draw, tracking
from rlfseg.adapter import Card
from rlfseg.backbone import Backbone, resolve_base
from rlfseg.config import TrainConfig, as_dict, digest
from rlfseg.errors import ConfigError, DataError
from rlfseg.metrics import Sums
from rlfseg.pipeline.folders import begin, fingerprint, finish, require_finished, write_json
from rlfseg.pipeline.ingest import Latents, batches, open_latents
from rlfseg.pipeline.progress import Progress
from rlfseg.pipeline.rows import Row
from rlfseg.pipeline.samples import LoadSample, open_samples
from rlfseg.pipeline.stages import Summary, check_budget, connect, our_cause
from rlfseg.segmenter import Segmenter
from rlfseg.training import Labelled, TrainState

SHOWN = 4  # validation pictures on an overlay sheet


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker is told.

    Attributes:
        config: All settings.
        out: Folder of the training, absolute: Ray moves a worker's working directory.
        latents: What is trained on.
        total_steps: Steps of the whole training.
        data: Fingerprint of the latents.
        uri: MLflow's address.
        run_id: The run; None where nothing is recorded.
    """

    config: TrainConfig
    out: Path
    latents: Latents
    total_steps: int
    data: str
    uri: str
    run_id: str | None


def run(config: TrainConfig) -> Summary:
    """Trains an adapter into `config.out`/adapter, going on from the last checkpoint of an unfinished start.

    Args:
        config: Settings of the command.

    Returns:
        Counts, seconds and the figures of validation.

    Raises:
        ConfigError: The data is smaller than one global batch, or the latents are of another base or resolution.
        DataError: The latents are unfinished, or the loss is not a number.
        ResourceError: The cluster is too small.
    """
    start = time.monotonic()
    if config.val_samples is not None:
        val_samples = str(Path(config.val_samples).absolute())
        config = replace(config, val_samples=val_samples)
        open_samples(val_samples)  # told now, not by a worker
    folder, out = Path(config.latents).absolute(), Path(config.out).absolute()
    latents = open_latents(folder)
    _check_match(config, folder)
    resolve_base(config.backbone.base)  # downloads once, before the workers ask for it all at once
    steps = latents.steps(config.workers, config.batch_size)
    if not steps:
        raise ConfigError(
            f"batch_size: {config.workers} x {config.batch_size} phrases a step are more than "
            f"the {latents.total} there are"
        )
    total = min(config.max_steps or math.inf, config.epochs * steps)
    identity = _identity(config, fingerprint(folder))
    if begin(out, identity) == "done":
        return _summary(out, require_finished(out), 0.0, resumed=int(total))
    connect()
    check_budget("train", config.workers * (config.cpus + 1) + 1, config.workers if _use_gpu(config) else 0)
    with _tracked(config, out) as recorded:
        job = Job(
            config=config,
            out=out,
            latents=latents,
            total_steps=int(total),
            data=fingerprint(folder),
            uri=recorded.uri,
            run_id=recorded.id,
        )
        with Progress("train", total=job.total_steps, count=lambda: _steps_done(out)):
            result = _fit(job, digest(identity))
        counts = _publish(job, result, recorded)
    finish(out, identity, counts)
    return _summary(out, counts, time.monotonic() - start)


def _fit(job: Job, name: str) -> Result:
    config, use_gpu = job.config, _use_gpu(job.config)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "120")
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config.cpus} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=RunConfig(
            name=f"train-{name}",  # Ray resumes any run of the same name, so it holds the hash of the settings
            storage_path=str(job.out / "checkpoints"),
            # Ray swaps in its V2 class, which has this limit, at run time
            failure_config=FailureConfig(max_failures=config.max_failures, controller_failure_limit=3),  # type: ignore[call-arg]
            checkpoint_config=CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute="val_miou" if config.val_samples else "step"
            ),
        ),
    )
    try:
        return trainer.fit()
    except Exception as error:  # noqa: BLE001  Ray wraps ours in its own; the cause is what the user must see
        raise our_cause(error) or error from None


def _worker(loop_config: Row) -> None:
    """One training process."""
    job: Job = loop_config["job"]
    config, context = job.config, ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    backbone = Backbone.load(config.backbone)
    backbone.add_lora(config.lora, seed=config.seed)
    state = TrainState(config, backbone, job.total_steps)
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state.load(Path(folder))
    # A gradient's memory is the communication bucket's: one copy less
    state.model = prepare_model(backbone.velocity, parallel_strategy_kwargs={"gradient_as_bucket_view": True})
    recorded = tracking.Run.attach(job.uri, job.run_id if rank == 0 else None, default_dir=job.out)
    try:
        _train(job, state, recorded, _validation(config, rank, world), rank, world)
    finally:
        recorded.end()


def _train(
    job: Job, state: TrainState, recorded: tracking.Run, held_out: list[Labelled], rank: int, world: int
) -> None:
    config, steps = job.config, job.latents.steps(world, job.config.batch_size)
    meter = Meter(recorded, config.log_every, world * config.batch_size, job.out if rank == 0 else None)
    while state.step_number < job.total_steps:
        state.epoch, done = divmod(state.step_number, steps)
        for batch in batches(
            job.latents,
            seed=config.seed,
            epoch=state.epoch,
            rank=rank,
            world=world,
            batch=config.batch_size,
            start=done,
        ):
            figures = state.step(batch)
            if not math.isfinite(figures["loss"]):
                raise DataError(
                    f"step {state.step_number}: the loss is {figures['loss']}, phrases {list(batch.ids)[:8]}; "
                    "lower optimizer.lr"
                )
            meter.add(state.step_number, figures)
            last = state.step_number >= job.total_steps
            if (
                last
                or state.step_number % config.checkpoint_every == 0
                or state.step_number % config.validate_every == 0
            ):
                _report(job, state, recorded, held_out, rank, world)
            if last:
                break


class Meter:
    """Averages a step's figures over a few steps and sends them to MLflow; tells the driver how far the training is."""

    def __init__(self, recorded: tracking.Run, every: int, phrases: int, out: Path | None):
        self.recorded, self.every, self.phrases, self.out = recorded, every, phrases, out
        self.rows: list[dict[str, float]] = []
        self.start = time.monotonic()

    def add(self, step: int, figures: dict[str, float]) -> None:
        """Takes one step's figures."""
        self.rows.append(figures)
        if step % self.every or self.out is None:
            return
        now = time.monotonic()
        mean = {k: sum(r[k] for r in self.rows) / len(self.rows) for k in figures}
        speed = len(self.rows) * self.phrases / (now - self.start)
        self.recorded.log_metrics(
            {f"train/{k}": v for k, v in mean.items()} | {"train/samples_per_second": speed}, step
        )
        with (self.out / "curve.jsonl").open("a") as lines:
            lines.write(json.dumps({"step": step, **mean, "samples_per_second": speed}) + "\n")
        self.rows, self.start = [], now


def _report(
    job: Job, state: TrainState, recorded: tracking.Run, held_out: list[Labelled], rank: int, world: int
) -> None:
    """Validates on all ranks, saves on rank 0."""
    card = _card(job)
    figures: dict[str, float] = {}
    if job.config.val_samples:
        figures = _gather(state.validate(held_out, card), world).results()
        recorded.log_metrics({f"val/{k}": v for k, v in figures.items()}, state.step_number)
    card = replace(card, metrics=figures)
    metrics = {"step": state.step_number, **{f"val_{k}": v for k, v in figures.items()}}
    checkpoint = None
    if rank == 0:
        if held_out:
            sheet = draw.save(job.out / "overlays" / f"step-{state.step_number:07d}.png", _sheet(state, card, held_out))
            recorded.log_artifact(sheet, "overlays")
        folder = Path(tempfile.mkdtemp())
        state.save(folder, card)
        checkpoint = Checkpoint.from_directory(folder)
    ray.train.report(metrics, checkpoint=checkpoint)
    if checkpoint:
        shutil.rmtree(checkpoint.path, ignore_errors=True)


def _gather(sums: Sums, world: int) -> Sums:
    if world == 1:
        return sums
    parts: list[Row] = [{} for _ in range(world)]
    torch.distributed.all_gather_object(parts, sums.to_dict())
    whole = Sums()
    for part in parts:
        whole.merge(Sums.from_dict(part))
    return whole


def _validation(config: TrainConfig, rank: int, world: int) -> list[Labelled]:
    """This rank's share of the fixed validation pictures."""
    if config.val_samples is None:
        return []
    samples = open_samples(config.val_samples)
    load = LoadSample(samples.folder)
    rows = [load(r) for r in samples.rows.slice(0, config.val_images).to_pylist()[rank::world]]
    return [Labelled(image=r["image"], phrases=r["captions"], masks=np.stack(r["labels"])) for r in rows if r["labels"]]


def _sheet(state: TrainState, card: Card, held_out: list[Labelled]) -> np.ndarray:
    segmenter, cells = Segmenter(state.backbone, card), []
    for sample in held_out[:SHOWN]:
        results = segmenter.segment([sample.image], [sample.phrases])[0]
        cells.append([
            draw.overlay(sample.image, list(sample.masks), list(sample.phrases)),
            draw.overlay(sample.image, [r.mask for r in results], list(sample.phrases)),
        ])  # fmt: skip
    return draw.contact_sheet(cells, titles=["label", f"step {state.step_number}"])


# --- driver's side -------------------------------------------------------------------------------------------------


def _publish(job: Job, result: Result, recorded: tracking.Run) -> Row:
    """Copies the best checkpoint (the last, without validation) to `adapter` and records it."""
    kept = result.best_checkpoints or []
    checkpoint, metrics = max(kept, key=lambda pair: pair[1].get("val_miou", pair[1]["step"]))
    target = job.out / "adapter"
    with checkpoint.as_directory() as folder:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder, target, ignore=shutil.ignore_patterns("state.pt", "progress.json", ".*"))
    adapter.read_card(target)
    curve = _curve(job.out)
    if curve:
        series = {
            k: ([r["step"] for r in curve], [r[k] for r in curve]) for k in ("loss", "chose_refined", "lr", "grad_norm")
        }
        recorded.log_artifact(draw.curves(job.out / "curves.png", series), "curves")
    recorded.log_artifacts(target, "adapter")
    model = tracking.log_model_folder(recorded, target, Path(adapter.__file__).with_name("pyfunc_model.py"))
    seen = {"steps": job.total_steps, "phrases": job.latents.total, "step_of_adapter": metrics["step"]}
    figures = {k: v for k, v in metrics.items() if k.startswith("val_")}
    counts = {"rows_in": job.latents.total, "rows_out": job.latents.total, "refused": {}}
    return {**counts, "model": model, "run_id": job.run_id, **seen, "figures": figures}


def _card(job: Job) -> Card:
    config = job.config
    return Card(
        base=config.backbone.base,
        resolution=config.backbone.resolution,
        full=config.lora.full,
        data=job.data,
        run_id=job.run_id or "",
        config=as_dict(config),
    )


def _identity(config: TrainConfig, data: str) -> Row:
    """What the result depends on; where it is recorded and how often it is looked at may change on resume."""
    free = {"out", "latents", "val_samples", "tracking", "max_failures", "log_every", "cpus"}
    return {k: v for k, v in as_dict(config).items() if k not in free} | {"data": data}


def _check_match(config: TrainConfig, folder: Path) -> None:
    encoded = require_finished(folder)["identity"]["backbone"]
    for field in ("base", "resolution"):
        if encoded[field] != getattr(config.backbone, field):
            raise ConfigError(
                f"backbone.{field}: {getattr(config.backbone, field)}, but {folder} was encoded with {encoded[field]}; "
                "use the same"
            )


def _tracked(config: TrainConfig, out: Path) -> tracking.Run:
    """The MLflow run of this training: a new one, or on resume the one that it had."""
    note = out / "mlflow.json"
    if note.is_file():
        known = json.loads(note.read_text())
        return tracking.Run.resume(known["uri"], known["run_id"], default_dir=out)
    recorded = tracking.Run.start(
        config.tracking, params=as_dict(config), run_name=out.name, tags={"rlfseg.stage": "train"}
    )
    if recorded.id:
        write_json(note, {"uri": recorded.uri, "run_id": recorded.id})
    return recorded


def _use_gpu(config: TrainConfig) -> bool:
    wanted = config.backbone.device
    return wanted == "cuda" or (wanted == "auto" and ray.cluster_resources().get("GPU", 0) > 0)


def _steps_done(out: Path) -> int:
    curve = _curve(out)
    return int(curve[-1]["step"]) if curve else 0


def _curve(out: Path) -> list[Row]:
    path = out / "curve.jsonl"
    if not path.is_file():
        return []
    rows = {r["step"]: r for r in map(json.loads, path.read_text().splitlines())}  # a repeated step counts once
    return [rows[k] for k in sorted(rows)]


def _summary(out: Path, counts: Row, seconds: float, resumed: int = 0) -> Summary:
    return Summary(
        name="train",
        out=str(out / "adapter"),
        rows_in=counts["rows_in"],
        rows_out=counts["rows_out"],
        refused={},
        seconds=seconds,
        resumed=resumed,
        figures=counts["figures"],
    )
