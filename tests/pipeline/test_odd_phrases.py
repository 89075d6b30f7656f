"""Phrases that are empty or too long, and captions that HDF5 can't name, on their way from a file to a mask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from rlfseg import hdf5
from rlfseg.backbone import Backbone, count_cut
from rlfseg.config import ASSETS, BackboneConfig, LoraConfig, RefineConfig, TrainConfig
from rlfseg.datasets.shapes import draw_scene
from rlfseg.errors import BadSample
from rlfseg.hdf5 import Labelled, Sample
from rlfseg.images import rle_decode
from rlfseg.pipeline import encode, predict, refine
from rlfseg.pipeline.encode import Encoder
from rlfseg.pipeline.folders import weights, write_json
from rlfseg.pipeline.pictures import OfShards
from rlfseg.pipeline.predict import Finish, Load, Predictor
from rlfseg.pipeline.refine import Refiner
from rlfseg.pipeline.samples import LoadSample, open_samples
from rlfseg.pipeline.sources import open_source
from rlfseg.pipeline.train import odd_phrases
from rlfseg.segmenter import Segmenter, checked_phrase
from rlfseg.training import TrainState

BASE = ASSETS / "base"
ENCODED = {"base": "tiny", "resolution": 64, "weights": weights(BASE / "vae")}
LIMIT = 32  # tokens of the drawn world's text encoder; SD's has 77
LONG = " ".join(["ring"] * 120)
CAPTIONS = ["", "red ring", " \t", f"{LONG} red", f"{LONG} blue", "blue star"]


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter.load("tiny", device="cpu")


# --- too long --------------------------------------------------------------------------------------------------------


@pytest.mark.fault("token-01")
def test_a_long_phrase_is_cut_where_the_encoder_ends_and_said_to_be(segmenter: Segmenter) -> None:
    """By hand: the first 31 tokens and the end; the same states in training, prediction and service."""
    tokenizer, encoder = (
        CLIPTokenizer.from_pretrained(BASE / "tokenizer"),
        CLIPTextModel.from_pretrained(BASE / "text_encoder"),
    )
    whole = tokenizer(LONG).input_ids
    assert len(whole) > 100
    cut = torch.tensor([[*whole[: LIMIT - 1], whole[-1]]])
    with torch.no_grad():
        truth = encoder(cut).last_hidden_state[0]
    states = segmenter.backbone.text([f"{LONG} red", f"{LONG} blue", "red ring"])  # what TrainState calls too
    torch.testing.assert_close(states[0], truth, rtol=0, atol=1e-5)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    results = segmenter(draw_scene(0).image, [f"{LONG} red", f"{LONG} blue", "red ring", " ".join(["ring"] * 200)])
    assert [r.truncated for r in results] == [True, True, False, True]
    np.testing.assert_allclose(results[0].score, results[1].score, atol=1e-5)


@pytest.mark.fault("token-01")
def test_training_tells_what_it_did_not_see(segmenter: Segmenter) -> None:
    rings = [" ".join(["ring"] * n) for n in range(1, 100)]
    exact = [r for r in rings if not segmenter.backbone.too_long(r)][-1]
    assert count_cut(BASE, [exact, f"{exact} ring", LONG, LONG, "red ring"]) == 3
    assert odd_phrases([CAPTIONS, ["dog"]], BASE) == [
        "2 empty phrases were left out",
        "2 phrases are longer than the text encoder takes; it saw only their beginnings",
    ]
    assert odd_phrases([["red ring"], []], BASE) == []


# --- empty -----------------------------------------------------------------------------------------------------------


def finished(folder: Path, **identity: object) -> None:
    for name in ("_STARTED.json", "_SUCCESS.json"):
        write_json(folder / name, {"schema": 1, "hash": "x", "identity": identity, "rows_in": 1})


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Two samples; each mask's top left pixels count its phrase."""
    masks = []
    for n in range(len(CAPTIONS)):
        mask = np.zeros((64, 64), np.uint8)
        mask[: 8 * (n + 1)] = 1
        masks.append(mask)
    phrases = tuple(Labelled(caption=c, mask=m) for c, m in zip(CAPTIONS, masks, strict=True))
    folder = tmp_path / "samples"
    folder.mkdir()
    image = draw_scene(0).image
    hdf5.write_shard(
        folder / "0.h5",
        [Sample(id="a", image=image, phrases=phrases), Sample(id="b", image=image, phrases=phrases[:1])],
    )
    hdf5.build_index(folder)
    finished(folder)
    return folder


@pytest.fixture
def encoded(tmp_path: Path) -> Path:
    """The same phrases as latents whose values are the phrase's number."""
    z = [np.full((1, 2, 2), n, np.float16).tobytes() for n in range(len(CAPTIONS))]
    row = {
        "id": "a",
        "status": "ok",
        "captions": CAPTIONS,
        "shape": [1, 2, 2],
        "z1": z[0],
        "z0": z,
        "z0_refined": [None] * 6,
    }
    (tmp_path / "latents" / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "latents" / "data" / "0.parquet")
    finished(tmp_path / "latents", backbone=ENCODED)
    return tmp_path / "latents"


@pytest.mark.fault("token-03")
def test_an_empty_phrase_is_never_learnt(prepared: Path, encoded: Path) -> None:
    tiny = BackboneConfig(base="tiny", resolution=64, device="cpu")
    said = [1, 3, 4, 5]
    latents = open_source(TrainConfig(latents=str(encoded), out="o", backbone=tiny))
    assert latents.counts.tolist() == [4]
    read = next(latents.reader([(0, k) for k in range(4)])()).to_pydict()
    assert read["caption"] == [CAPTIONS[k] for k in said]
    assert [np.frombuffer(z, np.float16)[0] for z in read["z0"]] == said
    assert read["id"] == [f"a#{k}" for k in said]
    pixels = open_source(TrainConfig(samples=str(prepared), out="o", backbone=tiny))
    assert sorted(pixels.counts.tolist()) == [0, 4]
    number = pixels.counts.tolist().index(4)
    read = next(pixels.reader([(number, k) for k in range(4)])()).to_pydict()
    assert read["caption"] == [CAPTIONS[k] for k in said]
    assert [np.frombuffer(m, np.uint8).reshape(64, 64)[:, 0].sum() for m in read["mask"]] == [8 * (k + 1) for k in said]


@pytest.mark.fault("token-03")
@pytest.mark.parametrize("phrase", ["", "   ", "\t\n", "\u00a0"])
def test_an_empty_phrase_is_refused_where_it_is_asked(segmenter: Segmenter, phrase: str) -> None:
    with pytest.raises(BadSample, match=r"is empty; say what to look for"):
        checked_phrase(phrase)
    with pytest.raises(BadSample, match=r"is empty; say what to look for"):
        segmenter(draw_scene(0).image, ["red ring", phrase])


@pytest.mark.fault("token-03")
def test_ids_do_not_depend_on_ftfy(tmp_path: Path) -> None:
    """Older tokenizers clean text by ftfy where that happens to be installed."""
    (tmp_path / "ftfy.py").write_text("def fix_text(text, *a, **k):\n    return 'mended ' + text\n")
    code = """
        import json, sys
        from importlib.util import find_spec
        from transformers import CLIPTokenizer
        tokenizer = CLIPTokenizer.from_pretrained(sys.argv[1], local_files_only=True)
        phrases = ["résumé", "re\u0301sume\u0301", "犬", "🐕 ring", "ＲＥＤ", "", "   ", "a  b", "x&amp;y"]
        print(json.dumps([find_spec("ftfy") is not None, [tokenizer(p).input_ids for p in phrases]]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(BASE / "tokenizer")]
    answers = []
    for path in ([], [str(tmp_path)]):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([*path, os.environ["PYTHONPATH"]])}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        answers.append(json.loads(done.stdout))
    assert [a[0] for a in answers] == [False, True]
    assert answers[0][1] == answers[1][1]
    assert len({tuple(ids) for ids in answers[0][1][:5]}) >= 4


# --- names that HDF5 can't hold --------------------------------------------------------------------------------------


@pytest.mark.fault("h5-key-05")
def test_captions_in_other_encodings_reach_tokenizer_and_json(tmp_path: Path, segmenter: Segmenter) -> None:
    image, mask = draw_scene(0).image, draw_scene(0).phrases[0].mask
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["7/image"] = image
        for name in (b"caf\xe9", "cafe\u0301".encode(), "café".encode(), "犬".encode()):
            file[b"7/mask/" + name] = mask
    captions = hdf5.read_captions(tmp_path / "a.h5", "7")
    assert sorted(captions) == sorted(["café", "cafe\u0301", "café", "犬"])  # the first was Latin-1
    results = segmenter(image, captions)
    assert [r.caption for r in results] == list(captions)
    assert json.loads(json.dumps([r.caption for r in results], ensure_ascii=False)) == list(captions)
    states = Backbone.text(segmenter.backbone, captions)
    assert torch.isfinite(states).all()


@pytest.mark.fault("h5-key-01")
def test_a_slash_goes_the_whole_way(tmp_path: Path, segmenter: Segmenter) -> None:
    """From the authors' file, where HDF5 made a group of it, to a refined mask, a training step and a prediction."""
    scene, caption = draw_scene(3), "black/white cat"
    theirs, folder = tmp_path / "theirs.h5", tmp_path / "samples"
    with h5py.File(theirs, "w") as file:
        file["100/image"], file[f"100/mask/{caption}"] = scene.image, scene.phrases[0].coarse
        assert isinstance(file["100/mask/black"], h5py.Group)
    folder.mkdir()
    hdf5.write_shard(folder / "0.h5", [hdf5.read_sample(theirs, i) for i in hdf5.iter_ids(theirs)])
    assert hdf5.build_index(folder)["captions"].to_pylist() == [[caption]]
    finished(folder)
    samples = open_samples(folder)
    (loaded,) = map(LoadSample(samples.folder), samples.rows.to_pylist())
    assert np.array_equal(loaded["labels"], [scene.phrases[0].coarse])

    refined = stored(Refiner(RefineConfig(samples="s", out="o"))([loaded]), refine.SCHEMA)
    assert refined[0]["captions"] == [caption]
    tiny = BackboneConfig(base="tiny", resolution=64, device="cpu")
    (tmp_path / "latents" / "data").mkdir(parents=True)
    rows = Encoder(tiny, segmenter.backbone)([loaded | {k: refined[0][k] for k in ("masks", "outcomes")}])
    pq.write_table(pa.Table.from_pylist(rows, schema=encode.SCHEMA), tmp_path / "latents" / "data" / "0.parquet")
    finished(tmp_path / "latents", backbone=ENCODED)

    config = TrainConfig(latents=str(tmp_path / "latents"), out="o", backbone=tiny, lora=LoraConfig(rank=2))
    source, backbone = open_source(config), Backbone.load(tiny)
    batch = source.batch(next(source.reader([(0, 0)])()), backbone)
    assert (batch.ids, batch.phrases) == (["100#0"], [caption])
    backbone.add_lora(config.lora)
    assert np.isfinite(TrainState(config, backbone, total_steps=1).step(batch)["loss"])

    load = Load(OfShards(samples.folder, []), 64)
    predicted = Finish(0.5)(Predictor(segmenter=segmenter)([load(row) for row in samples.rows.to_pylist()])[0])
    (row,) = stored([predicted | {"status": "ok"}], predict.SCHEMA)
    assert row["captions"] == [caption]
    assert rle_decode(row["masks"][0], (64, 64)).sum() == row["areas"][0]


def stored(rows: list[dict[str, Any]], schema: pa.Schema) -> list[dict[str, Any]]:
    """Rows as they come back from a stage's Parquet."""
    return pa.Table.from_pylist(rows, schema=schema).to_pylist()


def test_a_lone_surrogate_is_refused_before_it_is_written(tmp_path: Path) -> None:
    scene = draw_scene(0)
    sample = Sample(id="1", image=scene.image, phrases=(Labelled(caption="\ud800", mask=scene.phrases[0].mask),))
    with pytest.raises(BadSample, match=r"\[1\]: the caption '\\ud800' isn't Unicode text"):
        hdf5.write_shard(tmp_path / "a.h5", [sample])
