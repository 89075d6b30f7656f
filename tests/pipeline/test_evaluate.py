"""Evaluation without Ray: every protocol in one pass, refusals, what is told beside the figures."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from rlfseg import adapter, cli, hdf5, images, metrics
from rlfseg.config import PredictConfig
from rlfseg.datasets import folder, records
from rlfseg.errors import ConfigError, ModelError
from rlfseg.metrics import PROTOCOLS, Argmax, SemSeg
from rlfseg.pipeline import effective, evaluate, predict, report
from rlfseg.pipeline.bases import Opened
from rlfseg.pipeline.evaluate import LoadTruth, Measure, Scorer
from rlfseg.pipeline.folders import begin, finish
from rlfseg.pipeline.predictions import LoadPredicted, find
from rlfseg.pipeline.rows import Row, RowByRow
from rlfseg.pipeline.samples import Samples, open_samples
from rlfseg.pipeline.stages import Stage
from rlfseg.results import Square
from tests.pipeline.evaluated import ALL, CLASSES, config, given, made, written

# --- without Ray --------------------------------------------------------------------------------------------------


def test_one_pass_gives_every_protocol_what_it_gives_alone(tmp_path: Path) -> None:
    rows = made(0)
    got = written(rows, tmp_path, config())
    pairs = [(r, given(r, c), t) for r in rows for c, t in zip(r["captions"], r["labels"], strict=True)]
    assert got["denominator"]["n_missing_predictions"] == sum(s is None for _, s, _ in pairs) > 0
    for protocol in PROTOCOLS:
        whole = PROTOCOLS[protocol]()
        for row, score, truth in pairs:
            blank = np.zeros(row["size"], np.float32)
            one = metrics.measure(protocol, blank if score is None else score, truth, 0.5, missing=score is None)
            whole.merge(one)  # type: ignore[arg-type]
        assert got["protocols"][protocol] == json.loads(json.dumps(whole.results())), protocol
    assert {k: got[k] for k in got["protocols"]["rlfseg"]} == got["protocols"]["rlfseg"]
    semseg = SemSeg.none(3)
    for row in rows:
        best = Argmax(row["size"])
        for k, caption in enumerate(CLASSES):
            score = given(row, caption)
            best.add(np.zeros(row["size"], np.float32) if score is None else score, k)
        truth = metrics.true_labels(row["labels"], [CLASSES.index(c) for c in row["captions"]], row["size"])
        semseg.merge(SemSeg.of(best.labels, truth, 3))
    assert got["protocols"]["semseg"] == json.loads(json.dumps(semseg.results()))
    assert got["class_iou"] == dict(zip(CLASSES, semseg.iou().tolist(), strict=True))


@pytest.mark.fault("metric-09", part="results")
def test_thresholds_are_in_the_results_and_each_is_one_for_the_whole_set(tmp_path: Path) -> None:
    truth, rows = np.array([[1, 1, 0, 0]], np.uint8), []
    for name, score in (("low", [0.3, 0.3, 0.1, 0.1]), ("high", [0.9, 0.9, 0.7, 0.7])):  # each alone could be perfect
        own = {"id": name, "size": (1, 4), "captions": ["dog"], "labels": [truth], "subsets": [[]], "empty": 0}
        rows.append(own | {"scores": [np.array([score], np.float32)], "others": []})
    got = written(rows, tmp_path, config(protocol="rlfseg"))
    assert (got["threshold"], got["what"]["threshold"], got["what"]["threshold_from"]) == (0.5, 0.5, "a test")
    assert (got["miou"], got["best_miou"], got["best_threshold"]) == (0.25, 0.75, pytest.approx(0.1))
    table = (tmp_path / "results.md").read_text()
    assert "| threshold | 0.5 |\n| threshold_from | a test |" in table
    assert report.figures(got)["threshold"] == 0.5


def test_masks_that_are_not_drawn_as_phrasecuts_are_said_to_be_so(tmp_path: Path) -> None:
    warning = "phrasecut: the true masks are drawn by pycocotools; PhraseCut's own figures are on masks drawn by pil"
    got = written(made(0), tmp_path / "a", config(protocol="phrasecut"))
    assert got["notes"] == [warning]
    assert f"- {warning}" in (tmp_path / "a" / "results.md").read_text()
    assert written(made(0), tmp_path / "b", config(protocol="refer"))["notes"] == []
    pil = {"truth": {"rasteriser": "pil"}}
    assert effective.notes(config(protocol="phrasecut"), pil) == ()
    assert "not known to be drawn by pil" in effective.notes(config(protocol="phrasecut"), {"truth": {}})[0]


def a_set(folder: Path, *phrases: hdf5.Labelled) -> Samples:
    """A finished folder with one picture."""
    begin(folder, {})
    picture = np.full((*phrases[0].mask.shape, 3), 255, np.uint8)
    hdf5.write_shard(folder / "a.h5", [hdf5.Sample(id="1", image=picture, phrases=phrases)], {"rasteriser": "pil"})
    hdf5.build_index(folder)
    finish(folder, {}, {})
    return open_samples(folder)


@pytest.mark.parametrize("with_adapter", [True, False])
def test_an_empty_phrase_asks_for_nothing_and_is_counted(tmp_path: Path, with_adapter: bool) -> None:
    masks = {c: np.full((4, 6), n % 2, np.uint8) for n, c in enumerate(("", "dog", " \t", "cat"))}
    a_set(tmp_path, *(hdf5.Labelled(caption=c, mask=m) for c, m in masks.items()))
    kinds = [[["object", "stuff", "object", "object"]], [["name", "verbose", "name", "attribute"]]]  # as PhraseCut's
    hdf5.add_columns(tmp_path, {k: pa.array(v) for k, v in zip(("kind", "phrase_type"), kinds, strict=True)})
    samples = open_samples(tmp_path)
    (row,) = samples.rows.to_pylist()
    source = 8 if with_adapter else LoadPredicted(tmp_path)
    loaded = LoadTruth(samples, source)(row)
    assert (loaded["captions"], loaded["empty"]) == (["dog", "cat"], 2)
    of_kind = (["kind_stuff", "phrase_type_verbose"], ["kind_object", "phrase_type_attribute"])
    assert loaded["subsets"] == [["size_large", *own] for own in of_kind]
    assert [m.max() for m in loaded["labels"]] == [1, 1]
    if with_adapter:
        (loaded,) = Scorer(config(adapter="x"), segmenter=Echo())([loaded])  # type: ignore[arg-type]
    else:
        assert loaded["unused"] == 2  # the set's own empty phrases, as predictions
    got = RowByRow(Measure(config(protocol="rlfseg"), 0.5))([loaded])[0]
    assert (got["status"], len(got["iou"]), got["empty"]) == ("ok", 2, 2)
    assert evaluate._classes(samples) == ("cat", "dog")


@pytest.mark.fault("raster-10", part="evaluate")
def test_every_coding_of_a_true_mask_gives_the_same_figures(tmp_path: Path) -> None:
    mask = (np.arange(24).reshape(4, 6) % 5 < 2).astype(np.uint8)
    codings = {
        "bool.png": mask.astype(bool),
        "one.png": mask,
        "full.png": mask * 255,
        "float.tiff": mask / np.float32(1),
    }
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    for name, coded in codings.items():
        Image.fromarray(coded).save(tmp_path / name)
    Image.fromarray(mask.astype(np.uint16) * 60000 + 2000).save(tmp_path / "score.png")
    lines = [{"id": "a.png", "phrase": name, "png": "score.png"} for name in codings]
    (tmp_path / "theirs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lines = [{"image": "a.png", "phrase": name, "mask": name} for name in codings]
    (tmp_path / "phrases.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (record,) = folder.plan(tmp_path / "phrases.jsonl").records
    samples = a_set(tmp_path / "set", *records.load(record, "pil").sample.phrases)
    index = samples.rows.set_column(0, "id", pa.array(["a.png"]))
    (row,) = find(index, tmp_path / "theirs.jsonl").rows.to_pylist()
    loaded = LoadTruth(samples, LoadPredicted(tmp_path / "theirs.jsonl"))(row | {"id": "1"})
    done = Measure(config(protocol=tuple(PROTOCOLS)), 0.5)(loaded)
    for protocol in PROTOCOLS:
        assert len({vector.tobytes() for vector in done[protocol]}) == 1, protocol
    assert done["iou"] == [1, 1, 1, 1]


class Begun(Exception):
    """The stage would run now."""


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Stage]:
    """What would be run, of a command that isn't."""
    stages: list[Stage] = []

    def run(stage: Stage) -> None:
        stages.append(stage)
        raise Begun

    for module in (evaluate, predict):
        monkeypatch.setattr(module, "run_stage", run)
        monkeypatch.setattr(module, "connect", lambda: None)
        monkeypatch.setattr(module, "gpus_per_worker", lambda *_: 0)
    return stages


def an_adapter(folder: Path, **card: Any) -> Path:
    folder.mkdir()
    adapter.write_card(folder, adapter.Card(**{"base": "tiny", "resolution": 64, "threshold": 0.37} | card))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def test_what_an_adapter_computes_is_told_and_other_weights_are_another_job(tmp_path: Path, begun: list[Stage]) -> None:
    a_set(tmp_path / "set", hdf5.Labelled(caption="dog", mask=np.ones((4, 6), np.uint8)))
    held = an_adapter(tmp_path / "adapter", eps_aos=0.2)
    settings = config(adapter=str(held), predictions=None, samples=str(tmp_path / "set"), sampling={"rescale": "aos"})
    changes = (
        ("adapter_model.safetensors", b"weights"),
        ("adapter_model.safetensors", b"others"),
        ("adapter_config.json", b"{}"),
    )
    for name, content in changes:  # the first changes nothing
        with pytest.raises(Begun):
            evaluate.run(settings)
        (held / name).write_bytes(content)
    with pytest.raises(Begun):
        evaluate.run(settings)
    first, same, *others = (stage.identity for stage in begun)
    assert first == same
    assert [{k for k in first if first[k] != other[k]} for other in others] == [{"adapter_version"}] * 2
    assert len({other["adapter_version"] for other in others}) == 2
    what = effective.what(settings, open_samples(tmp_path / "set"), Opened(held, adapter.read_card(held)), None)
    assert (what["threshold"], what["threshold_from"]) == (0.37, "the adapter's card, calibrated")
    assert (what["adapter"], what["adapter_version"]) == (str(held), adapter.version(held))
    assert (what["sampling"]["rescale"], what["sampling"]["eps"]) == ("aos", 0.2)
    assert (what["clipseg_side"], what["refer_side"], what["present_only"]) == (352, 512, False)
    assert what["truth"] == {"source": None, "rasteriser": "pil"}
    assert begun[0].finish.threshold == 0.37  # type: ignore[union-attr]
    given = config(adapter=str(held), predictions=None, samples=str(tmp_path / "set"), threshold=0.6)
    what = effective.what(given, open_samples(tmp_path / "set"), Opened(held, adapter.read_card(held)), None)
    assert (what["threshold"], what["threshold_from"]) == (0.6, "--threshold")


@pytest.mark.fault("ingest-06", part="driver")
def test_a_base_of_the_hub_is_fetched_once_before_any_actor_begins(
    tmp_path: Path, begun: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_set(tmp_path / "set", hdf5.Labelled(caption="dog", mask=np.ones((4, 6), np.uint8)))
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    held = str(an_adapter(tmp_path / "adapter", base="hf:nobody/nothing@1"))
    measured = config(adapter=held, predictions=None, samples=str(tmp_path / "set"))
    asked = PredictConfig(images=str(tmp_path / "a.png"), phrases=("dog",), adapter=held, out=str(tmp_path / "out"))
    commands = (lambda: evaluate.run(measured), lambda: predict.run(asked))
    for command in commands:
        with pytest.raises(ModelError, match="hf:nobody/nothing@1 can't be downloaded and isn't in the cache"):
            command()
    assert not begun
    fetched: list[str] = []

    def fetch(repository: str, **_: Any) -> str:
        fetched.append(repository)
        return str(adapter.ASSETS / "base")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    for number, command in enumerate(commands, 1):
        with pytest.raises(Begun):
            command()
        assert fetched == ["nobody/nothing"] * number


def test_an_image_without_phrases_is_counted_and_breaks_nothing(tmp_path: Path) -> None:
    rows = made(3)
    rows[0] |= {"captions": [], "labels": [], "subsets": [], "scores": []}
    got = written(rows, tmp_path, config())
    assert got["n_images"] == got["denominator"]["n_images"] == sum(bool(r["captions"]) for r in rows) < 9
    assert got["denominator"]["n_images_without_phrases"] == 9 - got["n_images"]


def test_a_bad_score_refuses_its_image_alone(tmp_path: Path) -> None:
    rows = made(4)
    rows[1]["scores"][0][0, 0] = 7
    done = RowByRow(Measure(config(), 0.5, CLASSES))(rows)
    assert [r["status"] != "ok" for r in done] == [i == 1 for i in range(9)]
    assert "1 of" in done[1]["status"]
    got = written(rows, tmp_path, config())
    assert got["n_refused"] == 1
    assert got["denominator"]["n_skipped"] == 1


def test_tables_and_curves_are_for_reading(tmp_path: Path) -> None:
    got = written(made(5), tmp_path, config())
    table = (tmp_path / "results.md").read_text()
    for protocol in ALL:
        assert f"\n| {protocol} | " in table
    assert f"| gres | {got['protocols']['gres']['giou']:.4f} | {got['protocols']['gres']['ciou']:.4f} | " in table
    assert "50 resamples, seed 42" in table
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert max(curves["miou"]["rlfseg"]) == got["best_miou"]
    assert max(curves["miou"]["clipseg"]) == got["protocols"]["clipseg"]["miou_best"]
    for name in ("iou_by_threshold.png", "precision_recall.png"):
        assert images.load_image(tmp_path / name, name=name).std() > 0
    flat = report.figures(got)
    assert flat["miou"] == got["miou"]
    assert flat["clipseg/ap_clipseg"] == got["protocols"]["clipseg"]["ap_clipseg"]
    assert flat["rlfseg/miou_low"] <= flat["miou"] <= flat["rlfseg/miou_high"]
    assert all(isinstance(v, int | float) for v in flat.values())


class Echo:
    """A segmenter whose scores are drawn from picture and phrase; counts what it is asked at a time."""

    max_batch = 16

    def __init__(self, bad: str = "") -> None:
        self.asked, self.bad = [0], bad

    def encode_squares(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels[:, :1]

    def squares(self, z1: torch.Tensor, phrases: list[list[str]], *, sampling: Any) -> list[list[Square]]:
        self.asked.append(len(phrases[0]) if len(phrases) == 1 else 0)
        return [[self.square(z, p) for p in own] for z, own in zip(z1, phrases, strict=True)]

    def square(self, z1: torch.Tensor, phrase: str) -> Square:
        rng = np.random.default_rng([int(z1[0, 0, 0] * 100), *phrase.encode()])
        score = torch.from_numpy(rng.random((8, 8)).astype(np.float32)) * (np.nan if phrase == self.bad else 1)
        return Square(caption=phrase, score=score, gamma=0.1, clipped=phrase == "sky", truncated=False)


def asked(n: int) -> list[Row]:
    """Rows as the loader gives them for an adapter."""
    rows = made(6, n)
    for i, row in enumerate(rows):
        row["square"] = np.full((3, 8, 8), (i + 1) / 100, np.float32)
        del row["scores"], row["others"]
    return rows


@pytest.mark.parametrize("present_only", [True, False])
def test_semseg_asks_an_adapter_for_absent_classes_too(present_only: bool) -> None:
    classes = tuple(sorted({*CLASSES, *(f"class {n:02d}" for n in range(40))}))
    echo, rows = Echo(), asked(2)
    latents = [torch.from_numpy(row["square"])[:1] for row in rows]
    settings = config(adapter="x", predictions=None, protocol=("semseg",), present_only=present_only)
    scored = Scorer(settings, classes, segmenter=echo)(rows)  # type: ignore[arg-type]
    done = RowByRow(Measure(settings, 0.5, classes))(scored)
    for row, z1, got in zip(rows, latents, done, strict=True):
        among = [c for c in classes if c in row["captions"] or not present_only]
        assert got["n_classes"] == len(among)
        stack = np.stack([echo.square(z1, c).at(row["size"], 0).score for c in among])
        best = np.array([classes.index(c) for c in among], np.int32)[stack.argmax(axis=0)]
        truth = metrics.true_labels(row["labels"], [classes.index(c) for c in row["captions"]], row["size"])
        np.testing.assert_array_equal(got["semseg"], SemSeg.of(best, truth, len(classes)).vector())
        assert got["gamma"] == [0.1] * len(row["captions"])
        assert got["clipped"] == row["captions"].count("sky")
        own = [echo.square(z1, c).at(row["size"], 0).score > 0.5 for c in row["captions"]]
        assert got["iou"] == [metrics.iou(p, t) for p, t in zip(own, row["labels"], strict=True)]
    assert max(echo.asked) <= echo.max_batch


@pytest.mark.parametrize(("protocol", "bad"), [("rlfseg", "sky"), ("semseg", "absent")])
def test_nan_refuses_its_picture_alone(protocol: str, bad: str) -> None:
    classes, rows = (*CLASSES, "absent"), asked(6)
    settings = config(adapter="x", predictions=None, protocol=(protocol,))
    scored = Scorer(settings, classes, segmenter=Echo(bad))(rows)  # type: ignore[arg-type]
    done = [r if r["status"] != "ok" else RowByRow(Measure(settings, 0.5, classes))([r])[0] for r in scored]
    asked_bad = [bad in r["captions"] or protocol == "semseg" for r in asked(6)]
    assert [r["status"] != "ok" for r in done] == asked_bad
    assert any(asked_bad)
    assert all("NaN" in r["status"] for r in done if r["status"] != "ok")
    if protocol == "rlfseg":
        told = {f"refused: evaluate [{r['id']}]: the network gave NaN" for r in done if r["status"] != "ok"}
        assert {r["status"] for r in done} == told | {"ok"}


@pytest.mark.parametrize("given", ["rlfseg,clipseg", "[rlfseg, clipseg]", "[rlfseg,clipseg,rlfseg]", "rlfseg, clipseg"])
def test_protocols_may_be_written_either_way(given: str) -> None:
    parsed = cli.parse("evaluate", ["--samples=a", "--out=b", f"--protocol={given}"])
    assert parsed.protocols == ("rlfseg", "clipseg")


@pytest.mark.parametrize(
    ("given", "message"), [("mIoU", "protocol: 'mIoU' unknown; the protocols are rlfseg, "), ("[]", "empty")]
)
def test_unknown_protocols_are_refused(given: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--samples=nowhere", "--out=b", "--adapter=tiny", f"--protocol={given}"]
    assert cli.main("evaluate", flags) == 2
    assert message in capsys.readouterr().err


def test_too_many_classes_are_no_classes() -> None:
    captions = pa.array([[f"the {n}" for n in range(2001)]])
    samples = SimpleNamespace(rows=pa.table({"captions": captions}), folder="runs/phrases")
    with pytest.raises(ConfigError, match="has 2001 different ones"):
        evaluate._classes(samples)  # type: ignore[arg-type]
