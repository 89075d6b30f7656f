"""Evaluation by the command, on real Ray."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlfseg import cli, hdf5, metrics
from rlfseg.metrics import PROTOCOLS, PhraseCut
from rlfseg.pipeline import report
from rlfseg.pipeline.folders import begin, finish
from rlfseg.pipeline.rows import Row
from rlfseg.pipeline.samples import open_samples
from tests.pipeline.evaluated import ALL, config, made, written


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory, ray: None) -> Path:
    """Ten drawn scenes and 16-bit scores of another system for them, one of which is missing."""
    out = tmp_path_factory.mktemp("evaluate")
    assert cli.main("prepare", [f"--out={out / 'test'}", "--shapes.count=10", "--images_per_shard=4"]) == 0
    rng = np.random.default_rng(0)
    lines = []
    (out / "theirs").mkdir()
    for row in hdf5.read_index(out / "test").to_pylist():
        for n, phrase in enumerate(hdf5.read_sample(out / "test" / row["shard"], row["id"]).phrases):
            score = np.clip(0.7 * phrase.mask + 0.4 * rng.random(phrase.mask.shape), 0, 1)
            png = f"{row['id']}_{n}.png"
            Image.fromarray((score * 65535).astype(np.uint16)).save(out / "theirs" / png)
            lines.append({"id": row["id"], "phrase": phrase.caption, "png": png})
    (out / "theirs" / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines[1:])))
    return out


@pytest.mark.timeout(1800)
def test_another_systems_scores_by_every_protocol(scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        f"--samples={scenes / 'test'}",
        f"--predictions={scenes / 'theirs'}",
        f"--protocol={','.join(ALL)}",
        f"--out={scenes / 'out'}",
        f"--tracking.uri=sqlite:///{scenes / 'mlflow.db'}",
        "--overlays=2",
        "--resamples=100",
    ]
    assert cli.main("evaluate", flags) == 0
    got = json.loads((scenes / "out" / "results.json").read_text())
    whole, lost = {p: PROTOCOLS[p]() for p in PROTOCOLS}, True
    for row in hdf5.read_index(scenes / "test").to_pylist():
        for n, phrase in enumerate(hdf5.read_sample(scenes / "test" / row["shard"], row["id"]).phrases):
            levels = np.array(Image.open(scenes / "theirs" / f"{row['id']}_{n}.png"))
            score = levels.astype(np.float32) / 65535 * (not lost)
            for protocol, sums in whole.items():
                sums.merge(metrics.measure(protocol, score, phrase.mask, 0.5, missing=lost))  # type: ignore[arg-type]
            lost = False
    assert {p: got["protocols"][p] for p in PROTOCOLS} == json.loads(
        json.dumps({p: sums.results() for p, sums in whole.items()})
    )
    assert isinstance(whole["phrasecut"], PhraseCut)
    assert got["denominator"]["n_missing_predictions"] == whole["phrasecut"].n_missing == 1
    assert got["denominator"]["n_evaluated"] == got["n_samples"]
    assert {p.name for p in (scenes / "out").glob("*.png")} >= {"best.png", "worst.png", "precision_recall.png"}
    what = got["what"]
    assert (what["threshold"], what["threshold_from"]) == (0.5, "the default for predictions")
    assert (what["predictions"], what["samples"]) == (str(scenes / "theirs"), str(scenes / "test"))
    assert what["samples_fingerprint"] == open_samples(scenes / "test").fingerprint
    assert what["truth"] == {"source": "shapes", "rasteriser": None}
    warning = "phrasecut: the true masks are not known to be drawn by pil"
    assert warning in capsys.readouterr().out
    assert cli.main("evaluate", flags) == 0
    said = capsys.readouterr().out
    assert "10 of them done before" in said
    assert warning in said
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{scenes / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("rlfseg")
    assert experiment is not None
    logged = client.search_runs([experiment.experiment_id])[0]
    assert logged.data.metrics["test/clipseg/ap_clipseg"] == got["protocols"]["clipseg"]["ap_clipseg"]
    assert logged.data.metrics["test/miou"] == got["miou"]
    assert logged.data.metrics["test/threshold"] == float(logged.data.params["what.threshold"]) == 0.5


@pytest.mark.timeout(1800)
@pytest.mark.fault("ingest-04")
def test_what_was_skipped_is_in_the_denominators_note(tmp_path: Path, ray: None) -> None:
    """Three pictures are missing on disk, two phrases have no mask; one mask has three sentences."""
    folder = tmp_path / "data"
    folder.mkdir()
    mask = np.zeros((20, 30), np.uint8)
    mask[5:15, 5:15] = 255
    lines = []
    for name in ("here", "gone1", "gone2", "gone3", "bare1", "bare2", "other"):
        if not name.startswith("gone"):
            Image.new("RGB", (30, 20), "teal").save(folder / f"{name}.png")
        if not name.startswith("bare"):
            Image.fromarray(mask).save(folder / f"{name}_mask.png")
        sentences = ["the dog", "dog on the left", "left"] if name == "here" else ["thing"]
        lines += [{"image": f"{name}.png", "phrase": s, "mask": f"{name}_mask.png"} for s in sentences]
    (folder / "phrases.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ["--source=folder", f"--path={folder}", "--on_error=skip", f"--out={tmp_path / 'samples'}"]
    assert cli.main("prepare", flags) == cli.REFUSED_SOME
    code = cli.main(
        "evaluate",
        [
            f"--samples={tmp_path / 'samples'}",
            f"--predictions={tmp_path / 'samples'}",
            "--protocol=[refer,phrasecut]",
            f"--out={tmp_path / 'out'}",
            "--tracking.enabled=false",
            "--overlays=0",
        ],
    )
    assert code == 0
    got = json.loads((tmp_path / "out" / "results.json").read_text())
    assert got["protocols"]["refer"]["n_samples"] == got["denominator"]["n_evaluated"] == 4
    assert got["protocols"]["refer"]["miou"] == got["protocols"]["phrasecut"]["miou"] == 1
    assert got["denominator"]["n_images"] == 2
    assert got["denominator"]["n_skipped"] == 5
    assert sum(got["denominator"]["skipped_in_prepare"].values()) == 5
    assert "n_skipped | 5" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.timeout(1800)
@pytest.mark.fault("raster-07", part="evaluate")
@pytest.mark.fault("ingest-03", part="evaluate")
@pytest.mark.parametrize(("rule", "area"), [("pil", 100), ("pycocotools", 81)])
def test_what_prepare_draws_is_its_own_best_prediction_and_what_is_missing_is_told(
    tmp_path: Path, ray: None, rule: str, area: int
) -> None:
    """A square with corners 0 and 9 in seven pictures of COCO's form, three of them not on disk; five more that are."""
    (tmp_path / "images").mkdir()
    for number in (*range(1, 5), *range(20, 25)):
        Image.new("RGB", (30, 20)).save(tmp_path / "images" / f"{number}.png")
    square = {"category_id": 1, "iscrowd": 0, "segmentation": [[0, 0, 0, 9, 9, 9, 9, 0]]}
    tree = {
        "images": [{"id": n, "file_name": f"{n}.png", "height": 20, "width": 30} for n in range(1, 8)],
        "annotations": [square | {"id": n, "image_id": n} for n in range(1, 8)],
        "categories": [{"id": 1, "name": "square"}],
    }
    (tmp_path / "mine.json").write_text(json.dumps(tree))
    places = [f"--path={tmp_path / 'mine.json'}", f"--images={tmp_path / 'images'}", f"--out={tmp_path / 'set'}"]
    flags = ["--source=coco", "--on_error=skip", f"--rasteriser={rule}", *places]
    assert cli.main("prepare", flags) == cli.REFUSED_SOME
    places = [f"--samples={tmp_path / 'set'}", f"--predictions={tmp_path / 'set'}", f"--out={tmp_path / 'out'}"]
    flags = ["--protocol=rlfseg,phrasecut", "--tracking.enabled=false", "--overlays=0", *places]
    assert cli.main("evaluate", flags) == 0
    got = json.loads((tmp_path / "out" / "results.json").read_text())
    (row, *_), note = open_samples(tmp_path / "set").rows.to_pylist(), got["denominator"]
    assert hdf5.read_sample(tmp_path / "set" / row["shard"], row["id"]).phrases[0].mask.sum() == area
    assert got["miou"] == got["protocols"]["phrasecut"]["miou"] == 1
    assert got["what"]["truth"]["rasteriser"] == rule
    assert any(line.startswith("phrasecut: ") for line in got["notes"]) == (rule != "pil")
    assert (note["n_evaluated"], note["n_skipped"], sum(note["skipped_in_prepare"].values())) == (4, 3, 3)
    assert "missing: 3 pictures are not on disk: 5.png, 6.png, 7.png" in got["notes"]
    assert any(line.startswith("unused: 5 pictures that no list names: 20.png") for line in got["notes"])
    assert "- missing: 3 pictures" in (tmp_path / "out" / "results.md").read_text()


def test_phrases_that_prepare_left_out_are_in_the_note_of_refined_samples_too(tmp_path: Path) -> None:
    report_of = {
        "name": "PhraseCut",
        "splits": {"val": {"found": {"images": 4, "phrases": 9}, "official": {"images": 5, "phrases": 9}}},
        "missing": [],
        "unused": {"count": 0, "first": []},
        "excluded": ["5", "6"],
        "exclusion": "excluded: 2 pictures by exclude_ids",
        "without_phrases": 3,
        "skipped": {"1: a": "no outline", "2: b": "no outline"},
        "partly": {"3: c": "1 polygons"},
    }
    prepared, refined = tmp_path / "made", tmp_path / "refined"
    for place, identity, told in (
        (prepared, {"source": "phrasecut"}, {"refused": {"9": "no picture"}, "report": report_of}),
        (refined, {"samples": str(prepared)}, {"refused": {"8": "too large"}}),
    ):
        begin(place, identity)
        finish(place, identity, told)
    settings = config(samples=str(refined), protocol="rlfseg")
    seen: list[Row] = [{"id": "1", "iou": [0.5, 0.7], "missing": [False, True], "clipped": 0, "empty": 1, "unused": 2}]
    refused, told = report._left_out(refined)
    note = report._denominator(settings, {"refused": {"7": "NaN"}}, seen, 4, refused, told)
    assert (note["n_skipped"], note["skipped_here"]) == (3, {"NaN": 1})
    assert note["skipped_in_prepare"] == {"no picture": 1, "too large": 1}
    assert (note["n_phrases_skipped"], note["n_phrases_drawn_partly"]) == (2, 1)
    assert note["phrases_skipped_in_prepare"] == {"no outline": 2}
    assert (note["n_images_excluded"], note["n_images_without_phrases"]) == (2, 3)
    assert (note["n_empty_phrases"], note["n_unused_predictions"]) == (1, 6)
    assert note["splits"]["val"]["official"]["images"] == 5
    got = written(made(9), tmp_path / "out", settings)
    assert got["notes"][0].startswith("val is not the official split: 4 images instead of 5")
    assert "excluded: 2 pictures by exclude_ids" in (tmp_path / "out" / "results.md").read_text()
