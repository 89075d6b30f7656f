"""The three steps of predict, called one after the other without Ray, against the library's front door."""

from __future__ import annotations

import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch
from PIL import Image

from rlfseg import images
from rlfseg.config import PredictConfig, SamplingConfig
from rlfseg.datasets.shapes import draw_scene
from rlfseg.errors import BadSample, ConfigError
from rlfseg.pipeline.predict import Finish, Load, Predictor, _phrases
from rlfseg.pipeline.rows import Row, RowByRow, Rows, runs, score_bytes
from rlfseg.pipeline.stages import CALL_BYTES
from rlfseg.results import Result, Square
from rlfseg.segmenter import Segmenter

Array = np.ndarray[Any, Any]
SIZES = [(64, 64), (31, 90), (128, 128), (1, 40), (200, 64)]
PHRASES = [["red ring"], ["star", "blue circle", "cross", "ring", "green star"], ["small red ring"], [], ["a ring"]]


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter.load("tiny", device="cpu")


def picture(n: int) -> Array:
    image = Image.fromarray(draw_scene(n, split="test").image)
    return np.asarray(image.resize(SIZES[n][::-1]))


def read(row: Row) -> tuple[Array, list[str]]:
    return picture(int(row["id"])), PHRASES[int(row["id"])]


def steps(segmenter: Segmenter, finish: Finish, **settings: Any) -> Rows:
    rows: Rows = [{"id": str(n)} for n in range(len(SIZES))]
    loaded = RowByRow(Load(read, segmenter.backbone.resolution))(rows)
    return RowByRow(finish)(Predictor(segmenter=segmenter, **settings)(loaded))


# --- the same as the front door ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [None, SamplingConfig(rescale="aos", eps=0.3)])
def test_masks_of_mixed_sizes_are_those_of_the_segmenter(segmenter: Segmenter, sampling: SamplingConfig | None) -> None:
    rows = steps(segmenter, Finish(0.4), sampling=sampling)
    for n, row in enumerate(rows):
        assert (row["id"], row["status"], row["captions"]) == (str(n), "ok", PHRASES[n])
        assert (row["height"], row["width"]) == SIZES[n]
        expected = segmenter(picture(n), PHRASES[n], sampling=sampling, threshold=0.4)
        for result, mask, score, area in zip(expected, row["masks"], row["scores"], row["areas"], strict=True):
            decoded = images.rle_decode(mask, SIZES[n])
            near = np.abs(result.score - 0.4) < 1e-4  # batches round differently in the last bits
            assert np.array_equal(decoded[~near], result.mask[~near])
            assert area == decoded.sum()
            assert score == pytest.approx(result.confidence, abs=1e-3)


def test_batches_are_filled_across_pictures_and_phrases(segmenter: Segmenter) -> None:
    filled = Segmenter(segmenter.backbone, segmenter.card, max_batch=3)
    sizes: list[int] = []
    hook = segmenter.backbone.velocity.register_forward_hook(lambda m, args, out: sizes.append(len(out)))
    steps(filled, Finish(0.5))
    hook.remove()
    assert sizes == [3, 3, 2]  # of 1 + 5 + 1 + 0 + 1 phrases


def test_what_is_sent_on_is_no_larger_than_the_scores(segmenter: Segmenter) -> None:
    loaded = RowByRow(Load(read, 64))([{"id": "1"}])
    [row] = Predictor(segmenter=segmenter)(loaded)
    scores = 5 * 64 * 64 * 4
    assert scores < len(pickle.dumps(row)) < scores + 5000


@pytest.mark.parametrize(
    ("phrases", "side", "calls"),
    [
        ([80] * 8, 512, [8]),
        ([128] * 8, 512, [8]),  # 1 GiB to the byte
        ([129] * 8, 512, [7, 1]),
        ([1203] * 3, 512, [1, 1, 1]),
        ([1203] * 8, 64, [8]),
        ([1, 2, 0, 1203, 4, 1], 512, [3, 1, 2]),  # one picture makes no other's call smaller
        ([0, 0], 512, [2]),
        ([], 512, []),
    ],
)
def test_a_call_gives_at_most_a_gigabyte_of_scores(phrases: list[int], side: int, calls: list[int]) -> None:
    rows: Rows = [{"id": str(n), "captions": ["x"] * count} for n, count in enumerate(phrases)]
    parts = list(runs(rows, partial(score_bytes, side), CALL_BYTES))
    assert [len(part) for part in parts] == calls
    assert [row for part in parts for row in part] == rows


def test_a_refused_row_has_no_scores() -> None:
    assert score_bytes(512, {"id": "a", "status": "refused: damaged"}) == 0


# --- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.fault("numeric-01")
def test_nan_refuses_its_own_picture_and_no_other(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    good = steps(segmenter, Finish(0.5))
    encode = segmenter.backbone.encode

    def broken(pixels: torch.Tensor) -> torch.Tensor:
        z1 = encode(pixels)
        z1[1, 0, 3, 3] = float("nan")
        return z1

    monkeypatch.setattr(segmenter.backbone, "encode", broken)
    rows = steps(segmenter, Finish(0.5))
    assert rows[1]["status"] == "refused: predict [1]: the network gave NaN for every phrase"
    for row, before in zip(rows, good, strict=True):
        if row["id"] != "1":
            assert row["masks"] == before["masks"]


def test_nan_of_one_phrase_is_its_outcome_and_no_empty_mask() -> None:
    def square(value: float) -> Square:
        return Square(caption="x", score=torch.full((8, 8), value), gamma=0, clipped=False, truncated=value == 0.9)

    row = Finish(0.5)({"id": "a", "size": (4, 6), "squares": [square(float("nan")), square(0.9), square(0.1)]})
    assert row["outcomes"][0] == "failed: the network gave NaN"
    assert "was cut" in row["outcomes"][1]
    assert row["masks"][0] is None
    assert row["areas"] == [None, 24, 0]
    assert row["scores"] == [None, pytest.approx(0.9), 0.0]


def test_scores_of_a_pictures_size_are_never_held_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at, living, most = Square.at, WeakSet[Result](), 0

    def watched(square: Square, size: tuple[int, int], threshold: float) -> Result:
        nonlocal most
        result = at(square, size, threshold)
        living.add(result)
        most = max(most, len(living))
        return result

    monkeypatch.setattr(Square, "at", watched)
    squares = [
        Square(caption="x", score=torch.full((8, 8), 0.1 * n), gamma=0, clipped=False, truncated=False)
        for n in range(9)
    ]
    row = {"id": "0", "index": {"id": "0"}, "size": SIZES[0], "squares": squares}
    Finish(0.5, png=tmp_path / "png", overlays=(tmp_path / "overlays", read))(row)
    assert most == 1
    assert (tmp_path / "overlays" / "0.png").is_file()


def test_phrases_by_list_and_by_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("blue star\n\n  grüner Ring \n", encoding="utf-8")
    config = PredictConfig(images="x", out="y", phrases=("red ring",), phrases_file=str(tmp_path / "p.txt"))
    assert _phrases(config) == ["red ring", "blue star", "grüner Ring"]
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfblue star\r\n")  # a BOM, as Windows' editors write it
    assert _phrases(config) == ["red ring", "blue star"]
    (tmp_path / "p.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"phrases_file: .*p\.txt can't be read"):
        _phrases(config)
    with pytest.raises(ConfigError, match="empty"):
        _phrases(PredictConfig(images="x", out="y", phrases=(" ",)))


# --- what is drawn -------------------------------------------------------------------------------------------------


def test_pngs_and_overlays(segmenter: Segmenter, tmp_path: Path) -> None:
    rows = steps(segmenter, Finish(0.5, png=tmp_path / "png", overlays=(tmp_path / "overlays", read)))
    assert sorted(p.name for p in (tmp_path / "overlays").iterdir()) == [f"{n}.png" for n in range(5)]
    for n, row in enumerate(rows):
        pngs = sorted((tmp_path / "png" / str(n)).glob("*.png")) if PHRASES[n] else []
        assert [p.name[:2] for p in pngs] == [f"{k:02d}" for k in range(len(PHRASES[n]))]
        for path, rle in zip(pngs, row["masks"], strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(path)), 255 * images.rle_decode(rle, SIZES[n]))


def test_an_undecodable_picture_is_refused_with_its_name() -> None:
    def bad(row: Row) -> tuple[Array, list[str]]:
        return images.load_image(b"no picture", name="a.jpg"), []

    with pytest.raises(BadSample, match=r"a\.jpg"):
        Load(bad, 64)({"id": "a.jpg"})


# --- what the driver and the CPU tasks load --------------------------------------------------------------------------


def test_drivers_load_no_torch_and_cpu_tasks_no_networks() -> None:
    code = "import sys, rlfseg.pipeline.predict as p; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["False", "False"]
