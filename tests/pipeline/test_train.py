"""`rlfseg train` without a cache, whole; what it keeps, starts from, and does where a file can't be written."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from rlfseg import adapter, cli, hdf5, tracking, training
from rlfseg.adapter import Card
from rlfseg.backbone import Backbone
from rlfseg.config import BackboneConfig, LoraConfig, OptimizerConfig, TrainConfig, as_dict
from rlfseg.datasets.shapes import draw_scene
from rlfseg.errors import ConfigError, RlfsegError
from rlfseg.hdf5 import Labelled, Sample
from rlfseg.metrics import Sums
from rlfseg.pipeline import loop, train
from rlfseg.pipeline.checkpoints import Store
from rlfseg.pipeline.curve import CURVE, read_curve
from rlfseg.pipeline.folders import write_json
from rlfseg.pipeline.ingest import batches
from rlfseg.pipeline.loop import MEANS, SKIPPED, Job, Loop, Meter, Stop
from rlfseg.pipeline.sources import open_source
from rlfseg.segmenter import Segmenter
from rlfseg.training import TrainState

TINY = BackboneConfig(base="tiny", resolution=64, device="cpu")
MADE_UP = (0.2, 0.6, 0.3, 0.1)  # mIoU after each step


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight drawn scenes of a phrase each, as `prepare` leaves them."""
    folder = tmp_path_factory.mktemp("samples")
    scenes = [draw_scene(n) for n in range(8)]
    labelled = [(Labelled(caption=s.phrases[0].caption, mask=s.phrases[0].mask),) for s in scenes]
    hdf5.write_shard(
        folder / "0.h5",
        [Sample(id=f"{n}", image=s.image, phrases=p) for n, (s, p) in enumerate(zip(scenes, labelled, strict=True))],
    )
    hdf5.build_index(folder)
    write_json(folder / "_SUCCESS.json", {"identity": {}})
    return folder


@pytest.mark.fault("dist-02")
@pytest.mark.usefixtures("ray")
def test_samples_are_encoded_in_the_loop_and_the_best_checkpoint_is_published(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All weights, two epochs of two steps of two batches on two workers, in real Ray; validation is played."""

    def played(loop_config: dict[str, Any]) -> RlfsegError | None:
        from rlfseg.pipeline import loop

        loop.Loop._validate = lambda self, card: {"miou": MADE_UP[self.state.step_number - 1]}  # type: ignore[method-assign]
        return loop.work(loop_config)

    monkeypatch.setattr(train, "work", played)
    out = tmp_path / "out"
    flags = [f"--out={out}", f"--samples={samples}", f"--val_samples={samples}", "--tracking.enabled=false"]
    flags += ["--backbone.base=tiny", "--backbone.resolution=64", "--lora.full=true", "--optimizer.lr=1e-3"]
    flags += ["--workers=2", "--batch_size=1", "--accumulate=2", "--epochs=2", "--validate_every=1", "--keep=1"]
    assert cli.main("train", [*flags, "--log_every=1"]) == 0
    said = capsys.readouterr().out
    # Ray's own warnings may come before it
    line = r"^train: 8 in, 8 out, 0 refused; [\d.]+ s, 4 of 4 steps, [\d.]+ steps/s on 2 workers, CPU, fp32"
    assert re.search(line, said, re.MULTILINE), said
    state = json.loads((out / "_SUCCESS.json").read_text())
    assert (state["steps"], state["step_of_adapter"], state["figures"]) == (4, 2, {"val_miou": 0.6})
    kept = [int(p.name.split("-")[1]) for p in sorted(out.glob("checkpoints/*/step-*"))]
    assert kept == [2, 4]  # the best and the last
    card = adapter.read_card(out / "adapter")
    assert (card.full, card.metrics) == (True, {"miou": 0.6})
    assert Segmenter.load(str(out / "adapter"))(draw_scene(0).image, ["star"])[0].mask.shape == (64, 64)

    # One plain process on the same steps
    config = TrainConfig(
        out="", samples=str(samples), workers=2, batch_size=1, accumulate=2, backbone=TINY, lora=LoraConfig(full=True)
    )
    config = dataclasses.replace(config, optimizer=OptimizerConfig(lr=1e-3))
    backbone = Backbone.load(TINY)
    backbone.add_lora(config.lora)
    plain, expected = TrainState(config, backbone, 4), list[dict[str, float]]()
    source = open_source(config)
    for epoch in (0, 1):
        plain.epoch, seen = epoch, list[str]()
        for step in batches(source, backbone, config, epoch=epoch, rank=0, world=1):
            seen += chain(*(b.ids for b in step))
            expected.append(plain.step(*step))
        assert sorted(seen) == [f"{n}#0" for n in range(8)]
    for row, figures in zip(read_curve(out), expected, strict=True):
        assert {k: row[k] for k in MEANS} == pytest.approx({k: figures[k] for k in MEANS}, rel=1e-2)
        assert row["workers"] == 2


# --- where it starts ----------------------------------------------------------------------------------------------


LORA = LoraConfig(rank=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with weights like no other's."""
    folder = tmp_path_factory.mktemp("adapter")
    backbone = Backbone.load(TINY)
    backbone.add_lora(LORA)
    for n, weight in enumerate(backbone.trainable()):
        weight.data.fill_(n + 1)
    settings = as_dict(TrainConfig(out="", backbone=TINY, lora=LORA))
    adapter.save(backbone, folder, Card(base="tiny", resolution=64, config=settings))
    return folder


def bare_loop(config: TrainConfig, out: Path, **parts: object) -> Loop:
    """The only process, with no more than a test looks at."""
    own = Loop.__new__(Loop)
    own.rank, own.world, own.config, own.recorded = 0, 1, config, tracking.Run("")
    own.job = Job(config=config, out=out, storage="", name="", total_steps=9, data="", uri="", run_id=None)
    vars(own).update(parts)
    return own


def test_a_training_can_start_from_an_adapter(trained: Path, tmp_path: Path) -> None:
    config = TrainConfig(out="", backbone=TINY, lora=LORA, init=str(trained))
    backbone = Backbone.load(TINY)
    backbone.add_lora(LORA)
    state = TrainState(config, backbone, 9)
    own = bare_loop(config, tmp_path, state=state, store=SimpleNamespace(whole=lambda: [].__iter__()))
    own.job = dataclasses.replace(own.job, init=trained)
    own._resume()
    assert [float(w.detach().flatten()[0]) for w in state.weights] == list(range(1, len(state.weights) + 1))
    assert state.step_number == 0


def test_an_adapter_of_another_shape_is_refused_before_the_start(trained: Path, samples: Path, tmp_path: Path) -> None:
    config = TrainConfig(out=str(tmp_path / "out"), samples=str(samples), backbone=TINY, lora=LORA, init=str(trained))
    with pytest.raises(ConfigError, match=r"init: .*other settings: lora \(.*'rank': 2.*there, .*'rank': 3.*here\)"):
        train.run(dataclasses.replace(config, lora=LoraConfig(rank=3)))
    assert not (tmp_path / "out").exists()


# --- files that can't be written ----------------------------------------------------------------------------------


def test_a_full_disk_costs_lines_and_overlays_but_no_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(out="", log_every=1, val_samples="")
    overlay = tmp_path / "overlays" / "step-0000007.png"
    overlay.parent.mkdir()
    for path in (tmp_path / CURVE, tmp_path / SKIPPED, overlay):
        path.symlink_to("/dev/full")
    figures = FIGURES
    meter = Meter(tracking.Run(""), config, tmp_path, 1.0, lambda own: [own])
    meter.add(1, figures)
    sums = Sums()
    sums.add(np.ones((2, 2), np.float32), np.ones((2, 2), np.uint8), 0.5)
    state = SimpleNamespace(step_number=7, validate=lambda held_out, card: (sums, 2))
    own = bare_loop(config, tmp_path, state=state, held_out=[None])
    monkeypatch.setattr(loop, "_sheet", lambda *_: np.zeros((9, 9, 3), np.uint8))
    own._note_skipped([], figures)
    card = Card(base="tiny", resolution=64)
    assert own._validate(card)["failed"] == 2
    own._draw(card)
    told = [r.getMessage() for r in caplog.records if "the training goes on" in r.getMessage()]
    assert [name for name in (CURVE, SKIPPED, overlay.name) if any(name in line for line in told)] == [
        *(CURVE, SKIPPED, overlay.name)
    ]
    assert all("No space left on device" in line for line in told)
    (tmp_path / CURVE).unlink()
    meter.add(2, figures)
    assert [row["step"] for row in read_curve(tmp_path)] == [2]


# --- what is logged, and what is kept -----------------------------------------------------------------------------


FIGURES = {"loss": 1.0, "refined": 0.0, "chose_refined": 0.0, "lr": 1.0, "grad_norm": 1.0, "skipped": 0.0}


def test_the_share_that_chose_refined_is_one_of_labels_whatever_steps_and_ranks_have_them(tmp_path: Path) -> None:
    """8 of 10 labels were chosen in one step of this rank, 0 of 2 by the other rank; a second step has none."""
    other = {"loss": 0.5, "lr": 0.5, "grad_norm": 0.5, "chosen": 0.0, "refined": 2.0}
    config = TrainConfig(out="", log_every=2)
    meter = Meter(tracking.Run(""), config, tmp_path, 0.5, lambda own: [own, other])
    meter.add(1, FIGURES | {"refined": 10.0, "chose_refined": 0.8})
    meter.add(2, FIGURES)
    single = Meter(tracking.Run(""), config, tmp_path, 1.0, lambda own: [own])
    single.add(3, FIGURES)
    single.add(4, FIGURES)
    first, second = read_curve(tmp_path)
    assert (first["loss"], first["chose_refined"], first["workers"]) == (1.0, pytest.approx(8 / 12), 2)
    assert "chose_refined" not in second  # there was nothing to choose


def test_an_entry_of_fewer_steps_than_it_stands_for_is_left_out(tmp_path: Path) -> None:
    """Gone on from step 3, with an entry every 2 steps."""
    meter = Meter(tracking.Run(""), TrainConfig(out="", log_every=2), tmp_path, 1.0, lambda own: [own])
    for step in range(4, 8):
        meter.add(step, FIGURES | {"loss": float(step)})
    assert [(r["step"], r["loss"]) for r in read_curve(tmp_path)] == [(6, 5.5)]


@pytest.mark.parametrize("last", [6, 7])
def test_no_checkpoint_is_made_while_no_weight_moves_but_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    """Steps 3 to 5 are bad; then it goes on, or a fourth bad one ends it."""
    bad = range(3, 7 if last == 6 else 6)
    state: Any = SimpleNamespace(step_number=0, bad_steps=0, epoch=0, backbone=None)

    def step(*_: object, weight: float) -> dict[str, float]:
        state.step_number += 1
        state.bad_steps = state.bad_steps + 1 if state.step_number in bad else 0
        return FIGURES | {"skipped": float(state.bad_steps > 0), "grad_norm": math.nan if state.bad_steps else 1.0}

    state.step = step
    monkeypatch.setattr(loop, "batches", lambda *_, **__: iter([[]] * 7))
    monkeypatch.setattr(loop, "steps_per_epoch", lambda *_: 7)
    config, made = TrainConfig(out="", checkpoint_every=2, validate_every=5, max_bad_steps=3), list[int]()
    own = bare_loop(config, tmp_path, state=state, source=SimpleNamespace(counts=None), store=Store(str(tmp_path), "a"))
    own.job = dataclasses.replace(own.job, total_steps=7)
    own.meter = Meter(own.recorded, config, None, 1.0, lambda figures: [figures])
    monkeypatch.setattr(own, "_report", lambda *, validate: made.append(state.step_number))
    if last == 7:
        own._epoch()
        assert made == [2, 6, 7]
        return
    with pytest.raises(Stop, match=r"nan for 4 steps in a row.*weights as they were at step 2 \(the last whose"):
        own._epoch()
    assert made == [2, 6]


def test_a_node_that_does_not_see_the_output_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it looks for the data, which it doesn't see either."""
    config = TrainConfig(out=str(tmp_path), samples="/nowhere")
    job = bare_loop(config, tmp_path).job
    where = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr("ray.train.get_context", lambda: where)
    job = dataclasses.replace(job, storage=str(tmp_path / "disk"), name="train-1")
    with pytest.raises(Stop, match=rf"out: {tmp_path} is not seen by .*; all nodes must share it"):
        Loop(job)
    write_json(tmp_path / "_STARTED.json", {})
    with pytest.raises(Stop, match=rf"storage: {tmp_path}/disk is not seen by .*; all nodes must share it"):
        Loop(job)
    (tmp_path / "disk" / "train-1").mkdir(parents=True)
    Loop._require_folders(bare_loop(config, tmp_path, store=Store(job.storage, job.name)))


def test_what_the_network_makes_nan_of_is_drawn_empty() -> None:
    backbone = Backbone.load(TINY)
    backbone.add_lora(LORA)
    backbone.trainable()[0].data.fill_(math.nan)
    state = TrainState(TrainConfig(out="", latents="", backbone=TINY, lora=LORA), backbone, 2)
    scene = draw_scene(0)
    held_out = training.Labelled(image=scene.image, phrases=["ring"], masks=scene.phrases[0].mask[None])
    assert loop._sheet(state, Card(base="tiny", resolution=64), [held_out]).ndim == 3


def test_readers_take_no_cpu_beside_as_many_workers_as_there_are_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray starts so many of an elastic training; tasks that wanted one more would wait for ever."""
    taken = list[dict[str, Any]]()

    def read(source: object, **pace: Any) -> SimpleNamespace:
        taken.append(pace)
        return SimpleNamespace(iter_batches=lambda **_: iter(()))

    monkeypatch.setattr("ray.data.read_datasource", read)
    source: Any = SimpleNamespace(counts=np.ones(8, np.int64), by_file=False, phrase_bytes=1)
    for least in (None, 1):
        config = TrainConfig(out="", samples="a", batch_size=1, workers=2, min_workers=least)
        assert not list(batches(source, cast(Any, None), config, epoch=0, rank=0, world=2))
    assert taken == [{}, {"concurrency": 1, "num_cpus": 0}]
