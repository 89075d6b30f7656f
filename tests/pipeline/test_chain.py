"""The whole chain on real Ray and a real MLflow, by the same commands that users type; small and in order."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from rlfseg import cli, hdf5, images
from rlfseg.backbone import Backbone
from rlfseg.config import BackboneConfig, TrainConfig
from rlfseg.datasets.shapes import draw_scene
from rlfseg.pipeline.ingest import batches
from rlfseg.pipeline.sources import open_source

FEW = 12
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
        f"--val_samples={out / 'exact'}",
        "--val_images=4",
        "--max_steps=4",
        "--checkpoint_every=2",
        "--validate_every=2",
        "--log_every=1",
        "--batch_size=4",
        f"--out={out / 'train'}",
        tracking,
    )
    adapter = f"--adapter={out / 'train' / 'adapter'}"
    run("calibrate", adapter, f"--samples={out / 'exact'}", f"--out={out / 'calibration'}", tracking)
    run("evaluate", adapter, f"--samples={out / 'exact'}", "--sampling.rescale=aos", f"--out={out / 'test'}", tracking)
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


def figures(folder: Path) -> dict[str, float]:
    return dict(json.loads((folder / "results.json").read_text()))


def rows(folder: Path) -> list[dict[str, object]]:
    return [r for p in sorted((folder / "data").glob("*.parquet")) for r in pq.read_table(p).to_pylist()]


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


def test_validation_leaves_overlays_and_figures_in_mlflow(chain: Path) -> None:
    state = json.loads((chain / "train" / "_SUCCESS.json").read_text())
    client = MlflowClient(f"sqlite:///{chain / 'mlflow.db'}")
    sheets = [Path(a.path).name for a in client.list_artifacts(state["run_id"], "overlays")]
    assert sheets == [f"step-{n:07d}.png" for n in (2, 4)]
    assert [m.step for m in client.get_metric_history(state["run_id"], "val/miou")] == [2, 4]
    assert [m.step for m in client.get_metric_history(state["run_id"], "train/loss")] == [1, 2, 3, 4]
    assert state["step_of_adapter"] in (2, 4)


def test_calibration_reaches_the_adapter(chain: Path) -> None:
    card = (chain / "train" / "adapter" / "rlfseg.yaml").read_text()
    chosen = json.loads((chain / "calibration" / "calibration.json").read_text())["chosen"]
    assert f"eps_aos: {chosen['eps_aos']}" in card
    assert f"threshold: {chosen['threshold']}" in card


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


def test_the_logged_model_serves_from_a_fresh_process(chain: Path, tmp_path: Path) -> None:
    state = json.loads((chain / "train" / "_SUCCESS.json").read_text())
    picture = tmp_path / "scene.png"
    Image.fromarray(draw_scene(0).image).save(picture)
    code = f"""
import mlflow, pandas as pd, pathlib
mlflow.set_tracking_uri("sqlite:///{chain / "mlflow.db"}")
model = mlflow.pyfunc.load_model("{state["model"]}")
image = pathlib.Path("{picture}").read_bytes()
asked = pd.DataFrame({{"image": [image, image], "phrase": ["red ring", "star"]}})
print(model.predict(asked).to_json(orient="records"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert [(r["phrase"], r["height"], r["width"]) for r in found] == [("red ring", 64, 64), ("star", 64, 64)]
