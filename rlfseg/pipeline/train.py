"""Train: `TorchTrainer` around `loop.Loop`. Latents or samples in, an adapter out, resumed at the very step."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from rlfseg import adapter, draw, tracking
from rlfseg.config import TrainConfig, as_dict, without_passwords
from rlfseg.errors import ConfigError, ModelError, ResourceError, RlfsegError
from rlfseg.hub import resolve_base
from rlfseg.pipeline.causes import our_cause
from rlfseg.pipeline.checkpoints import SEAL, Store
from rlfseg.pipeline.cluster import arithmetic, check_budget, check_nodes, connect, lacks, nodes, where
from rlfseg.pipeline.curve import latest, read_curve, spared
from rlfseg.pipeline.folders import (
    STARTED,
    alone,
    begin,
    finish,
    read_json,
    remove,
    require_finished,
    unclaim,
    weights,
    write_json,
)
from rlfseg.pipeline.ingest import group_size, steps_per_epoch
from rlfseg.pipeline.loop import LEFT_OUT, SCORE, SHOWN_FIGURES, Job, work
from rlfseg.pipeline.progress import Progress
from rlfseg.pipeline.rows import Row
from rlfseg.pipeline.samples import open_samples
from rlfseg.pipeline.sources import Source, odd_phrases, open_source
from rlfseg.pipeline.stages import Summary
from rlfseg.training import PROGRESS, STATE, binding

logger = logging.getLogger(__name__)

NO_ADAPTER = shutil.ignore_patterns(STATE, PROGRESS, SEAL, ".*")  # of a checkpoint
# Until there is room for the workers; Ray's own is 60 s, and it would try for ever. Where fewer may go on they need not
# wait: just after a node was lost, Ray counts on it once more
START_TIMEOUT_S, ELASTIC_TIMEOUT_S = "300", "30"
START_FAILURES = 3


def run(config: TrainConfig) -> Summary:
    """Trains an adapter into `config.out`/adapter, going on from the newest checkpoint of an unfinished start.

    Args:
        config: Settings of the command.

    Returns:
        Counts, seconds and the figures of validation.

    Raises:
        ConfigError: The data is smaller than one step, the latents are of another base or resolution, or there are no
            refined labels and `selection` wants them.
        DataError: The latents are unfinished, the gradient stays NaN, or another process trains into `out`.
        ModelError: The checkpoints are of other settings.
        ResourceError: The cluster is too small, or the checkpoints' disk is full.
    """
    start = time.monotonic()
    config = _absolute(config)
    # Told now, not by a worker
    held_out = open_samples(config.val_samples).fingerprint if config.val_samples else None
    out = Path(config.out)
    source = open_source(config)
    phrases, steps = int(source.counts.sum()), steps_per_epoch(source.counts, config)
    _check(config, source, steps)
    base = resolve_base(config.backbone.base)  # downloads once, before the workers ask for it all at once
    init = _found_init(config, base) if config.init else None
    total = int(min(config.max_steps or math.inf, config.epochs * steps))
    identity = binding(as_dict(config)) | {"data": source.fingerprint, "val_data": held_out}
    identity |= {"weights": weights(*(base / part for part in ("unet", "vae", "text_encoder")))}
    identity |= {"init": weights(init) if init else None}  # whatever its name: an alias may move
    if (group := group_size(config.workers)) != group_size(1):
        identity["shuffled by"] = group
    state = begin(out, identity)
    if state == "done":
        return _summary(out, require_finished(out), 0.0, resumed=phrases)
    with alone(out):
        store = _ready(config, out, state)
        before = store.newest_step()
        with _tracked(config, out) as recorded:
            job = Job(
                config=config,
                out=out,
                storage=store.storage,
                name=store.name,
                total_steps=total,
                data=_described(config, source),
                uri=recorded.uri,
                run_id=recorded.id,
                init=_kept(init, out) if init else None,
            )
            counts = {"rows_in": phrases, "rows_out": phrases, "refused": {}} | _train(job, store, recorded)
            counts |= {"notes": _notes(job, source, base, steps), "where": _where(config)}
        finish(out, identity, counts)
    return _summary(out, counts, time.monotonic() - start, steps=total - before)


def _train(job: Job, store: Store, recorded: tracking.Run) -> Row:
    """Trains, publishes the best checkpoint and deletes what deaths have left; returns what is to be told of it."""

    def done() -> int:
        return int(latest(job.out).get("step", 0))

    needs = _needs(job.config)

    def tell() -> str:
        if short := lacks(*needs):  # with min_workers; else the training would have failed
            return f"waiting: it needs {short}"
        row = latest(job.out)
        return f"loss {row['loss']:.4f}" if "loss" in row else ""

    with Progress("train", total=job.total_steps, count=done, unit="steps", tell=tell):
        listed = _fit(job, store)
    counts = _publish(job, store, recorded)
    store.sweep(listed)
    return counts


def _ready(config: TrainConfig, out: Path, state: str) -> Store:
    """A Ray that is large enough, and where the checkpoints go, tried out; what is refused here claims no folder."""
    started = read_json(out / STARTED)
    # Ray resumes any run of the same name, so no other training has it, in a storage that many of them share
    name = f"{out.name}-{started.get('id', started['hash'])}"
    try:
        connect()
        check_budget("train", *_needs(config), lower="workers, min_workers or cpus")
        check_nodes("train", {"cpus": config.cpus})
        store = Store(config.storage or str(out / "checkpoints"), name)
        store.ready()
        _require_same(store, out / "storage.json")
    except (ConfigError, ResourceError):
        if state == "new":
            remove(out)
        raise
    write_json(out / "storage.json", {"storage": store.shown})
    return store


def _require_same(store: Store, note: Path) -> None:
    """Refuses a resume from a storage that holds nothing of what was done: it would begin anew without a word."""
    known = read_json(note)["storage"] if note.is_file() else store.shown
    if known != store.shown and not store.newest_step():
        raise ConfigError(
            f"storage: {store.shown} holds no checkpoint of this training, which kept them in {known}; give that, or "
            f"copy {store.name} from there, or give another `out` to train anew"
        )


def _notes(job: Job, source: Source, base: Path, steps: int) -> list[str]:
    """What of the data is not used, and settings without effect, as lines for the user."""
    config = job.config
    size = config.workers * config.batch_size * config.accumulate
    tail = int(source.counts.sum()) - steps * size if job.total_steps >= steps else 0
    idle = config.selection == "dynamic" and not source.has_refined
    notes = {
        f"{tail} phrases an epoch are left out, as a step takes {size}; others in each epoch": tail,
        f"selection: dynamic has no effect: {config.latents or config.samples} holds no refined labels": idle,
    }
    left_out = read_json(job.out / LEFT_OUT)["validation"]
    return [*odd_phrases(source.captions, base), *(note for note, is_so in notes.items() if is_so), *left_out]


def _where(config: TrainConfig) -> str:
    gpus = config.workers if _use_gpu(config) else 0
    return where(config.workers, gpus, arithmetic(config.backbone.dtype, gpus))


def _absolute(config: TrainConfig) -> TrainConfig:
    """Ray moves a worker's working directory."""
    return replace(
        config,
        out=str(Path(config.out).absolute()),
        latents=_place(config.latents),
        samples=_place(config.samples),
        val_samples=_place(config.val_samples),
        init=_place(config.init) if config.init and Path(config.init).exists() else config.init,
        storage=_place(config.storage),
    )


def _place(path: str | None) -> str | None:
    return path if path is None or "://" in path else str(Path(path).absolute())


def _check(config: TrainConfig, source: Source, steps: int) -> None:
    if not steps:
        raise ConfigError(
            f"batch_size: {config.workers} x {config.batch_size} x {config.accumulate} phrases a step are more than "
            f"the {source.counts.sum()} there are"
        )
    if config.selection == "refined" and not source.has_refined:
        raise ConfigError(
            f"selection: refined, but {config.latents or config.samples} holds no refined labels; `rlfseg refine` "
            "makes them, or set selection: original"
        )
    if (config.min_workers or 1) > config.workers:
        raise ConfigError(f"min_workers: {config.min_workers} is more than workers: {config.workers}")


def _found_init(config: TrainConfig, base: Path) -> Path:
    """The folder of the adapter to start from, which fits."""
    found = adapter.resolve(str(config.init), uri=config.tracking.uri)
    card = adapter.read_card(found)
    there = {"base": card.base_weights or card.base, "lora": card.config.get("lora")}
    own = adapter.weights_hash(base) if card.base_weights else config.backbone.base
    here = {"base": own, "lora": as_dict(config)["lora"]}
    if wrong := [f"{k} ({there[k]!r} there, {here[k]!r} here)" for k in here if there[k] != here[k]]:
        raise ConfigError(f"init: {config.init} was trained with other settings: {'; '.join(wrong)}; use the same")
    return found


def _kept(init: Path, out: Path) -> Path:
    """The adapter to start from, copied once into `out`, which all nodes see."""
    target, half = out / "init", out / ".init.tmp"
    if not target.exists():
        try:
            shutil.rmtree(half, ignore_errors=True)
            shutil.copytree(init, half, ignore=NO_ADAPTER)
            half.rename(target)
        except OSError as error:
            raise ResourceError(f"out: {target} can't be written: {error}") from error
    return target


def _fit(job: Job, store: Store) -> set[str]:
    """Trains; returns the paths of the checkpoints that Ray has kept."""
    config, use_gpu = job.config, _use_gpu(job.config)
    elastic = config.min_workers is not None
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", ELASTIC_TIMEOUT_S if elastic else START_TIMEOUT_S)
    start_failures = START_FAILURES + (config.max_failures if elastic else 0)  # each node lost may cost one
    trainer = TorchTrainer(
        work,  # type: ignore[arg-type]  # V2 takes what a worker returns
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            # Ray swaps in its V2 classes, which take pairs and have this limit, at run time
            num_workers=(config.min_workers, config.workers) if config.min_workers else config.workers,  # type: ignore[arg-type]
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config.cpus} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=RunConfig(
            name=job.name,
            storage_path=store.root,
            storage_filesystem=store.filesystem,
            failure_config=FailureConfig(max_failures=config.max_failures, controller_failure_limit=start_failures),  # type: ignore[call-arg]
            checkpoint_config=CheckpointConfig(num_to_keep=config.keep, checkpoint_score_attribute=SCORE),
        ),
    )
    try:
        result: Any = trainer.fit()
    except TrainingFailedError as error:
        cause = _cause(error, job)
        unclaim(job.out, cause, lambda: any(store.newest_first()))
        raise cause from None
    if isinstance(result.return_value, RlfsegError):
        raise result.return_value
    best = [checkpoint for checkpoint, _ in result.best_checkpoints or ()]
    return {checkpoint.path for checkpoint in (*best, result.checkpoint) if checkpoint}  # which is the last


def _cause(error: TrainingFailedError, job: Job) -> RlfsegError:
    """What the user must see of it: our own error on whatever rank, else one line on what ended a worker."""
    of_workers = list(getattr(error, "worker_failures", {}).values())
    # A dead worker is seen as a check of its health that failed
    failures = [
        getattr(f, "health_check_failure", f) for f in of_workers or [getattr(error, "controller_failure", error)]
    ]
    if ours := next(filter(None, map(our_cause, failures)), None):
        return ours
    # Where one dies, the others fail for want of it
    first = next((f for f in failures if isinstance(f, RayActorError)), failures[0])
    # What Ray carried here from a worker is a traceback, and its last line the error
    lines = str(first).strip().splitlines()[-1:] if isinstance(first, RayTaskError) else str(first).split()
    text = " ".join(lines)[:300]
    what = f"a worker failed, more often than max_failures: {job.config.max_failures}"
    fix = "lower batch_size and raise accumulate, by the same factor, or set speed.gradient_checkpointing; then "
    return ResourceError(
        f"{what if of_workers else 'what starts the workers failed'}: {text}; "
        f"{fix if 'out of memory' in text.lower() else ''}the same command goes on from the newest checkpoint"
    )


def _described(config: TrainConfig, source: Source) -> str:
    """What is trained on, in a line for people: where it comes from, its splits and counts, its fingerprint."""
    folder = Path(config.latents or config.samples or "")
    prepared = Path(require_finished(folder)["identity"].get("samples", folder))
    made = require_finished(prepared)["identity"] if (prepared / "_SUCCESS.json").is_file() else {}  # it may be gone
    drawn = made.get("shapes", {}) if made.get("source") == "shapes" else {}
    splits = [drawn["split"]] if drawn else made.get("splits") or ["all splits"]
    origin = " ".join(filter(None, [made.get("source", "unknown source"), made.get("path"), ", ".join(splits)]))
    images, phrases = len(source.captions), int(source.counts.sum())
    return f"{origin}: {images:,} images, {phrases:,} phrases, by way of {folder} (fingerprint {source.fingerprint})"


def _publish(job: Job, store: Store, recorded: tracking.Run) -> Row:
    """Copies the best whole checkpoint (the last, without validation) to `adapter` and records it."""
    target = job.out / "adapter"
    try:
        step, metrics = _copy_best(store, target)
    except OSError as error:
        raise ResourceError(
            f"out: {target} can't be written: {error}. All steps are done, and kept in {store.shown}; make room and "
            "give the same command again"
        ) from error
    curve = read_curve(job.out)
    if curve:
        series = {k: ([r["step"] for r in curve], [r.get(k, math.nan) for r in curve]) for k in SHOWN_FIGURES}
        with spared(job.out / "curves.png"):
            recorded.log_artifact(draw.curves(job.out / "curves.png", series), "curves")
    recorded.log_artifacts(target, "adapter")
    model = tracking.log_model_folder(recorded, target)
    figures = {f"val_{k}": v for k, v in metrics.items()}
    return {"model": model, "run_id": job.run_id, "steps": job.total_steps, "step_of_adapter": step, "figures": figures}


def _copy_best(store: Store, target: Path) -> tuple[int, dict[str, float]]:
    """Copies the best whole checkpoint, or without validation the last; its step and figures."""
    step, metrics = -1, dict[str, float]()
    for _, folder in store.whole():
        card, done = adapter.read_card(folder), json.loads((folder / PROGRESS).read_text())["step"]
        if step < 0 or card.metrics.get("miou", -1.0) > metrics.get("miou", -1.0):
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(folder, target, ignore=NO_ADAPTER)
            metrics, step = card.metrics, done
    if step < 0:
        raise ModelError(f"{store.shown}: none of the checkpoints is whole; give another `out` to train anew")
    return step, metrics


def _tracked(config: TrainConfig, out: Path) -> tracking.Run:
    """The MLflow run of this training: a new one, or on resume the one that it had, if it is to be recorded there."""
    note, tags = out / "mlflow.json", {"rlfseg.stage": "train"}
    if config.tracking.enabled and note.is_file():
        known = read_json(note)
        asked = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")  # not the default, another in each folder
        uri = tracking.resolve_uri(asked) if asked else known["uri"]
        if without_passwords(uri) == known["uri"]:
            return tracking.Run.resume(uri, known["run_id"], default_dir=out)
        if tracking.has_run(uri, known["run_id"]):  # the same MLflow under another address
            write_json(note, known | {"uri": without_passwords(uri)})
            return tracking.Run.resume(uri, known["run_id"], default_dir=out)
        logger.warning(
            "tracking.uri: this training's run %s is at %s and not at %s; what follows goes into a new one there",
            *(known["run_id"], known["uri"], without_passwords(uri)),
        )
        tags["rlfseg.continues"] = known["run_id"]
    recorded = tracking.Run.start(config.tracking, params=as_dict(config), run_name=out.name, tags=tags)
    if recorded.id:
        write_json(note, {"uri": without_passwords(recorded.uri), "run_id": recorded.id})
        if recorded.uri.startswith("sqlite") and nodes() > 1:
            logger.warning(
                "tracking.uri: %s is a file of this node, and there are others: a worker there records nothing here; "
                "give a server's address in MLFLOW_TRACKING_URI",
                recorded.uri,
            )
    return recorded


def _needs(config: TrainConfig) -> tuple[float, float]:
    """CPUs and GPUs without which it can't go on: a worker's reader takes one CPU more, what leads them all one."""
    least = config.min_workers or config.workers
    return least * (config.cpus + 1) + 1, least if _use_gpu(config) else 0


def _use_gpu(config: TrainConfig) -> bool:
    wanted = config.backbone.device
    return wanted == "cuda" or (wanted == "auto" and ray.cluster_resources().get("GPU", 0) > 0)


def _summary(out: Path, counts: Row, seconds: float, resumed: int = 0, steps: int = 0) -> Summary:
    return Summary(
        name="train",
        out=str(out / "adapter"),
        rows_in=counts["rows_in"],
        rows_out=counts["rows_out"],
        refused={},
        seconds=seconds,
        resumed=resumed,
        pace=f"{steps} of {counts['steps']} steps, {steps / seconds:.1f} steps/s" if seconds else "",
        where=counts.get("where", ""),
        figures=counts["figures"],
        notes=tuple(counts.get("notes", ())),
    )
