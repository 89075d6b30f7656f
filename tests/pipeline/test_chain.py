"""The whole chain on real Ray and a real MLflow, by the same commands that users type; small and in order."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from mlflow import MlflowClient
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from safetensors.torch import load_file

from rlfseg import adapter, cli, hdf5, images, tracking
from rlfseg.backbone import Backbone
from rlfseg.config import BackboneConfig, TrackingConfig, TrainConfig
from rlfseg.datasets.shapes import draw_scene
from rlfseg.pipeline import train
from rlfseg.pipeline.folders import begin, finish
from rlfseg.pipeline.ingest import batches
from rlfseg.pipeline.samples import open_samples
from rlfseg.pipeline.sources import open_source

FEW = 12
CALIBRATED = ("threshold", "eps_aos", "eps_hss")
pytestmark = pytest.mark.timeout(1800)  # two minutes on an idle machine; a busy one is no failure


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, ray: None, root: Path) -> Path:
    """Runs every stage once; the tests look at what it left."""
    out = tmp_path_factory.mktemp("chain")
    configs = root / "jobs" / "configs" / "quickstart"
    tracking = f"--tracking.uri=sqlite:///{out / 'mlflow.db'}"

    def run(command: str, *flags: str) -> None:
        assert cli.main(command, list(flags)) == 0

    for name, labels in (("coarse", "coarse"), ("exact", "exact")):
        run(
            "prepare",
            f"--out={out / name}",
            f"--shapes.count={FEW}",
            f"--shapes.labels={labels}",
            "--images_per_shard=5",
        )
    run("refine", f"--config={configs / 'refine.yaml'}", f"--samples={out / 'coarse'}", f"--out={out / 'refined'}")
    run("encode", f"--config={configs / 'encode.yaml'}", f"--samples={out / 'refined'}", f"--out={out / 'latents'}")
    run(
        "train",
        f"--config={configs / 'train.yaml'}",
        f"--latents={out / 'latents'}",
        f"--val_samples={held_out(out / 'val')}",
        "--max_steps=4",
        "--checkpoint_every=2",
        "--validate_every=2",
        "--log_every=1",
        "--batch_size=4",
        f"--out={out / 'train'}",
        tracking,
    )
    trained = f"--adapter={out / 'train' / 'adapter'}"
    run("calibrate", trained, f"--samples={out / 'exact'}", f"--out={out / 'calibration'}", tracking)
    run("evaluate", trained, f"--samples={out / 'exact'}", "--sampling.rescale=aos", f"--out={out / 'test'}", tracking)
    for name in ("coarse", "refined"):
        run(
            "evaluate",
            f"--predictions={out / name}",
            f"--samples={out / 'exact'}",
            f"--out={out / ('labels-' + name)}",
            "--overlays=0",
            "--tracking.enabled=false",
        )
    return out


def held_out(folder: Path) -> Path:
    """Three samples to validate on: one of them has an empty phrase too, one has lost its picture."""
    begin(folder, {})
    samples = []
    for n, name in enumerate(("whole", "part", "damaged")):
        scene = draw_scene(n, split="val")
        phrases = [hdf5.Labelled(caption=p.caption, mask=p.mask) for p in scene.phrases]
        phrases += [hdf5.Labelled(caption="", mask=scene.phrases[0].mask)] if name == "part" else []
        samples.append(hdf5.Sample(id=name, image=scene.image, phrases=tuple(phrases)))
    hdf5.write_shard(folder / "a.h5", samples)
    hdf5.build_index(folder)
    with h5py.File(folder / "a.h5", "a") as file:
        del file["damaged/image"]
    finish(folder, {}, {"rows_in": 3})
    return folder


def figures(folder: Path) -> dict[str, float]:
    return dict(json.loads((folder / "results.json").read_text()))


def rows(folder: Path) -> list[dict[str, object]]:
    return [r for p in sorted((folder / "data").glob("*.parquet")) for r in pq.read_table(p).to_pylist()]


def newest_model(chain: Path) -> str:
    """`models:/...` of the model that the training's run got last."""
    run_id = json.loads((chain / "train" / "_SUCCESS.json").read_text())["run_id"]
    client = MlflowClient(f"sqlite:///{chain / 'mlflow.db'}")
    models = [client.get_logged_model(m.model_id) for m in client.get_run(run_id).outputs.model_outputs]
    return f"models:/{max(models, key=lambda m: m.creation_timestamp).model_id}"


def test_prepared_scenes_are_the_drawn_ones(chain: Path) -> None:
    index = hdf5.read_index(chain / "exact")
    assert sorted(index["id"].to_pylist()) == [f"train-{n:06d}" for n in range(FEW)]
    row = index.to_pylist()[0]
    sample, scene = hdf5.read_sample(chain / "exact" / row["shard"], row["id"]), draw_scene(int(row["id"][-6:]))
    np.testing.assert_array_equal(sample.image, scene.image)
    assert [p.caption for p in sample.phrases] == [p.caption for p in scene.phrases]


def test_no_image_is_lost_on_the_way(chain: Path) -> None:
    for stage in ("refined", "latents", "test", "calibration"):
        assert sorted(str(r["id"]) for r in rows(chain / stage)) == [f"train-{n:06d}" for n in range(FEW)]


def test_refined_labels_are_closer_to_the_exact_ones(chain: Path) -> None:
    assert figures(chain / "labels-refined")["miou"] > figures(chain / "labels-coarse")["miou"] + 0.1


def test_label_iou_equals_an_independent_count(chain: Path) -> None:
    ious = []
    for row in hdf5.read_index(chain / "exact").to_pylist():
        exact, coarse = (
            hdf5.read_sample(chain / n / row["shard"].replace("exact", n), row["id"]) for n in ("exact", "coarse")
        )
        for a, b in zip(exact.phrases, coarse.phrases, strict=True):
            ious.append((a.mask & b.mask).sum() / (a.mask | b.mask).sum())
    assert figures(chain / "labels-coarse")["miou"] == pytest.approx(np.mean(ious), abs=1e-9)


def test_samples_encoded_in_the_loop_are_what_the_cache_holds(chain: Path) -> None:
    backbone_config = BackboneConfig(base="tiny", resolution=64, device="cpu")
    config = TrainConfig(out="", latents=str(chain / "latents"), backbone=backbone_config, workers=3, batch_size=4)
    cached = open_source(config)
    encoded = open_source(replace(config, latents=None, samples=str(chain / "refined")))
    np.testing.assert_array_equal(cached.counts, encoded.counts)
    backbone = Backbone.load(backbone_config)
    where = {"epoch": 1, "rank": 0, "world": 2}  # of three lanes this process plays two
    ways = [batches(source, backbone, config, **where) for source in (cached, encoded)]
    steps = list(zip(*ways, strict=True))
    assert len(steps) == int(cached.counts.sum()) // 12
    for a, b in ((a, b) for step in steps for a, b in zip(*step, strict=True)):
        assert (a.ids, a.phrases, len(a.ids)) == (b.ids, b.phrases, 4)
        assert torch.equal(a.has_refined, b.has_refined)
        for name in ("z1", "z0", "z0_refined"):  # float16 has 11 bits
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=2**-11, atol=1e-4)
    assert any(a.has_refined.any() for step in steps for a in step[0])


def test_training_says_where_it_ran_and_what_it_left_out(chain: Path) -> None:
    state = json.loads((chain / "train" / "_SUCCESS.json").read_text())
    assert state["where"] == "2 workers, CPU, fp32"
    damaged, empty = sorted(note for note in state["notes"] if note.startswith("left out of validation"))
    assert f"{chain / 'val' / 'a.h5'} [damaged]" in damaged
    assert empty == "left out of validation: 1 empty phrases of part"


def test_validation_leaves_overlays_and_figures_in_mlflow(chain: Path) -> None:
    state = json.loads((chain / "train" / "_SUCCESS.json").read_text())
    client = MlflowClient(f"sqlite:///{chain / 'mlflow.db'}")
    sheets = [Path(a.path).name for a in client.list_artifacts(state["run_id"], "overlays")]
    assert sheets == [f"step-{n:07d}.png" for n in (2, 4)]
    assert [m.step for m in client.get_metric_history(state["run_id"], "val/miou")] == [2, 4]
    assert [m.step for m in client.get_metric_history(state["run_id"], "train/loss")] == [1, 2, 3, 4]
    assert state["step_of_adapter"] in (2, 4)


def test_all_of_a_training_is_in_mlflow(chain: Path) -> None:
    run_id = str(json.loads((chain / "train" / "_SUCCESS.json").read_text())["run_id"])
    client = MlflowClient(f"sqlite:///{chain / 'mlflow.db'}")
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["rlfseg.stage"]) == ("FINISHED", "train")
    wanted = {f"train/{k}" for k in ("loss", "chose_refined", "lr", "grad_norm", "samples_per_second")}
    wanted |= {"val/miou", "val/ap_pooled", "val/ap_sample", "system/cpu_utilization_percentage"}
    assert wanted <= run.data.metrics.keys()
    assert 0 <= run.data.metrics["train/chose_refined"] <= 1
    assert run.data.params["optimizer.lr"] == "0.003"
    assert run.data.metrics["train/lr"] == pytest.approx(0.003 * 4 / 20)  # the fourth step of twenty that warm up
    assert run.data.metrics["train/samples_per_second"] > 0
    # the load of the node that trains, beside that of the driver's machine
    assert [k for k in run.data.metrics if re.fullmatch(r"system/[0-9a-f]{8}/cpu_utilization_percentage", k)]
    assert (run.data.params["lora.rank"], run.data.params["max_steps"]) == ("64", "4")
    for folder, name in {"adapter": "adapter_model.safetensors", "curves": "curves.png", "": "config.yaml"}.items():
        assert f"{folder}/{name}".lstrip("/") in [a.path for a in client.list_artifacts(run_id, folder)]


def test_evaluation_and_calibration_belong_to_their_training(chain: Path) -> None:
    run_id = json.loads((chain / "train" / "_SUCCESS.json").read_text())["run_id"]
    client = MlflowClient(f"sqlite:///{chain / 'mlflow.db'}")
    experiment = client.get_run(run_id).info.experiment_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
    found = {run.data.tags["rlfseg.stage"]: run for run in children}
    assert found.keys() == {"evaluate", "calibrate"}
    assert {run.data.tags["rlfseg.training_run"] for run in children} == {run_id}
    assert found["evaluate"].data.metrics
    assert "calibration/threshold" in found["calibrate"].data.metrics


@pytest.mark.parametrize(("nodes", "warns"), [(1, False), (2, True)])
def test_a_file_as_tracking_store_is_warned_of_where_there_are_other_nodes(
    chain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    nodes: int,
    warns: bool,
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}] * nodes + [{"Alive": False}])
    config = TrainConfig(out=str(tmp_path), tracking=TrackingConfig(uri=f"sqlite:///{chain / 'mlflow.db'}"))
    train._tracked(config, tmp_path).end()
    assert ("MLFLOW_TRACKING_URI" in caplog.text) == warns


def test_calibration_reaches_the_adapter_and_mlflow(chain: Path, tmp_path: Path) -> None:
    chosen = json.loads((chain / "calibration" / "calibration.json").read_text())["chosen"]
    uri = f"sqlite:///{chain / 'mlflow.db'}"
    run_id = json.loads((chain / "train" / "_SUCCESS.json").read_text())["run_id"]
    folders = [
        chain / "train" / "adapter",
        tracking.download(f"runs:/{run_id}/adapter", tmp_path, uri=uri),
        tracking.download(newest_model(chain), uri=uri) / "artifacts" / "adapter",
    ]
    for folder in folders:
        card = adapter.read_card(folder)
        assert (card.threshold, card.eps_aos, card.eps_hss) == tuple(chosen[k] for k in CALIBRATED)
        assert card.calibration == {way: chosen[f"miou_{way}"] for way in ("one_step", "aos", "hss")}
        assert f"| one_step | {chosen['miou_one_step']:.4f} |" in (folder / "README.md").read_text()


def test_the_card_tells_what_was_trained_on(chain: Path) -> None:
    phrases = int(hdf5.read_index(chain / "coarse")["n_phrases"].to_numpy().sum())
    card = adapter.read_card(chain / "train" / "adapter")
    assert f"shapes train: {FEW} images, {phrases} phrases, by way of {chain / 'latents'} (fingerprint " in card.data
    assert "LoRA, rank 64, alpha 64" in (chain / "train" / "adapter" / "README.md").read_text()


def test_refined_labels_are_written_back_as_hdf5(chain: Path, tmp_path: Path) -> None:
    assert cli.main("export", [f"--samples={chain / 'refined'}", f"--out={tmp_path / 'h5'}"]) == 0
    index = {r["id"]: r["shard"] for r in hdf5.read_index(tmp_path / "h5").to_pylist()}
    refined = 0
    for row in open_samples(chain / "refined").rows.to_pylist():
        before = hdf5.read_sample(chain / "coarse" / row["shard"], row["id"])
        after = hdf5.read_sample(tmp_path / "h5" / index.pop(row["id"]), row["id"])
        np.testing.assert_array_equal(after.image, before.image)
        assert [p.caption for p in after.phrases] == [p.caption for p in before.phrases] == row["captions"]
        for old, new, mask, outcome in zip(before.phrases, after.phrases, row["masks"], row["outcomes"], strict=True):
            np.testing.assert_array_equal(new.mask, images.rle_decode(mask, new.mask.shape))
            assert (new.instances is None) == (outcome == "refined" or old.instances is None)
            refined += outcome == "refined" and not np.array_equal(new.mask, old.mask)
    assert index == {}
    assert refined > FEW


def test_the_trained_adapter_is_written_for_diffusers(chain: Path, tmp_path: Path) -> None:
    flags = [f"--adapter={chain / 'train' / 'adapter'}", f"--out={tmp_path}"]
    assert cli.main("export", flags) == 0
    keys = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert keys
    assert all(k.startswith("unet.") for k in keys)
    assert cli.main("export", [*flags, f"--samples={chain / 'refined'}"]) == 2
    assert cli.main("export", [f"--samples={chain / 'coarse'}", f"--out={tmp_path / 'no'}"]) == 2


def test_starting_again_repeats_nothing(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(p.name for p in (chain / "refined" / "data").iterdir())
    assert cli.main("refine", [f"--samples={chain / 'coarse'}", f"--out={chain / 'refined'}", "--max_rounds=4"]) == 0
    assert f"{FEW} of them done before" in capsys.readouterr().out
    assert sorted(p.name for p in (chain / "refined" / "data").iterdir()) == before


def test_other_settings_in_the_same_folder_are_refused(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main("refine", [f"--samples={chain / 'coarse'}", f"--out={chain / 'refined'}", "--tau=0.5"]) == 1
    assert "tau (0.98 then, 0.5 now)" in capsys.readouterr().err


def test_too_many_workers_are_refused_with_the_sum(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--samples={chain / 'coarse'}", f"--out={chain / 'never'}", "--run.workers=500"]
    assert cli.main("refine", flags) == 1
    assert "needs 504 CPUs" in capsys.readouterr().err


def test_a_training_with_too_many_workers_claims_no_folder(
    chain: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With fewer workers, which the error asks for, it is another training."""
    flags = [f"--config={root / 'jobs' / 'configs' / 'quickstart' / 'train.yaml'}", f"--latents={chain / 'latents'}"]
    assert cli.main("train", [*flags, "--workers=24", "--batch_size=1", f"--out={chain / 'never-1'}"]) == 1
    assert re.search(r"^rlfseg train: train needs \d+ CPUs and this Ray has", capsys.readouterr().err, re.MULTILINE)
    assert not (chain / "never-1").exists()


def test_pictures_of_any_kind_go_through_predict(chain: Path, tmp_path: Path) -> None:
    from sklearn.datasets import load_sample_images

    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, picture in zip(("china", "flower"), load_sample_images().images, strict=True):
        Image.fromarray(picture).save(folder / f"{name}.jpg")
    Image.fromarray(load_sample_images().images[0]).convert("P").save(folder / "palette.PNG")
    Image.new("L", (7, 31), 90).save(folder / "thin.png")
    (folder / "broken.jpg").write_bytes((folder / "china.jpg").read_bytes()[:900])
    out = tmp_path / "out"
    code = cli.main(
        "predict",
        [
            f"--images={folder}",
            "--phrases=[blue circle, star]",
            f"--adapter={chain / 'train' / 'adapter'}",
            "--overlays=true",
            "--png=true",
            f"--out={out}",
        ],
    )
    assert code == cli.REFUSED_SOME
    assert [Path(name).name for name in json.loads((out / "refused.json").read_text())] == ["broken.jpg"]
    done = {Path(str(r["id"])).name: r for r in rows(out) if r["status"] == "ok"}
    assert sorted(done) == ["china.jpg", "flower.jpg", "palette.PNG", "thin.png"]
    for name, row in done.items():
        with Image.open(folder / name) as picture:
            size = picture.size[::-1]
        masks = [images.rle_decode(m, size) for m in row["masks"]]  # type: ignore[attr-defined]
        assert [m.sum() for m in masks] == row["areas"]
    assert len(list((out / "overlays").iterdir())) == 4
    assert len(list((out / "png").rglob("*.png"))) == 8


SERVE = """
import json, sys, mlflow, pandas as pd, pathlib
uri, reference, picture = sys.argv[1:]
mlflow.set_tracking_uri(uri)
model = mlflow.pyfunc.load_model(reference)
image = pathlib.Path(picture).read_bytes()
asked = pd.DataFrame({"image": [image, image], "phrase": ["red ring", "star"]})
files = {n: m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] == "rlfseg"}
print(json.dumps({"found": model.predict(asked).to_dict("records"), "files": files}))
"""


def test_the_logged_model_serves_from_a_fresh_process_with_what_it_carries(chain: Path, tmp_path: Path) -> None:
    picture, uri = tmp_path / "scene.png", f"sqlite:///{chain / 'mlflow.db'}"
    Image.fromarray(draw_scene(0).image).save(picture)
    arguments = [sys.executable, "-c", SERVE, uri, newest_model(chain), str(picture)]
    alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=alone, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert [(r["phrase"], r["height"], r["width"]) for r in said["found"]] == [("red ring", 64, 64), ("star", 64, 64)]
    folder = tracking.download(newest_model(chain), uri=uri)
    files = [Path(f) for f in said["files"].values()]
    assert len(files) > 5
    assert all(f.is_relative_to(folder / "code" / "rlfseg") for f in files)  # the model's, not those of the checkout
    assert needed(files) <= closure((folder / "requirements.txt").read_text().split())


def needed(files: list[Path]) -> set[str]:
    """Packages that the files import, but those imported inside of functions or for types alone."""
    trees = [node for f in files for node in ast.parse(f.read_text()).body]
    names = {a.name for node in trees if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in trees if isinstance(node, ast.ImportFrom) and node.module}
    tops = {n.partition(".")[0] for n in names} - {"rlfseg"}
    owners = packages_distributions()
    return {canonicalize_name(owners[top][0]) for top in tops - set(sys.stdlib_module_names)}


def closure(requirements: list[str]) -> set[str]:
    """The packages that pip would install."""
    found: set[str] = set()
    todo = [Requirement(r) for r in requirements]
    while todo:
        name = canonicalize_name(todo.pop().name)
        if name not in found:
            found.add(name)
            own = map(Requirement, requires(name) or [])
            todo += [r for r in own if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found
