"""Bad input by the commands that users type: named by file and sample, skipped and counted, or the end of the job."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rlfseg import cli, hdf5
from rlfseg.datasets.shapes import draw_scene
from rlfseg.pipeline.folders import begin, finish

pytestmark = [pytest.mark.usefixtures("ray"), pytest.mark.timeout(1800)]
SCENE = draw_scene(0)


def shard(path: Path, *ids: str, caption: str = "red ring", mask: np.ndarray | None = None) -> Path:
    drawn = SCENE.phrases[0].mask if mask is None else mask
    phrase = hdf5.Labelled(caption=caption, mask=drawn)
    hdf5.write_shard(path, [hdf5.Sample(id=i, image=SCENE.image, phrases=(phrase,)) for i in ids])
    return path


def truncated(folder: Path) -> list[str]:
    path = shard(folder / "bad.h5", "x")
    path.write_bytes(path.read_bytes()[:-200])
    return ["bad.h5"]


def without_image(folder: Path) -> list[str]:
    with h5py.File(shard(folder / "bad.h5", "x"), "a") as file:
        del file["x/image"]
    return ["bad.h5", "[x]", "image"]


def mask_of_another_size(folder: Path) -> list[str]:
    with h5py.File(shard(folder / "bad.h5", "x"), "a") as file:
        del file["x/mask/red ring"]
        file["x/mask/red ring"] = np.ones((9, 9), np.uint8)
    return ["bad.h5", "[x]", "9"]


def empty_phrase(folder: Path) -> list[str]:
    shard(folder / "bad.h5", "x", caption="")
    return ["bad.h5", "[x]", "empty"]


def half_jpeg(folder: Path) -> list[str]:
    (folder / "good.h5").unlink()
    data = io.BytesIO()
    Image.fromarray(SCENE.image).save(data, "JPEG")
    (folder / "good.jpg").write_bytes(data.getvalue())
    (folder / "bad.jpg").write_bytes(data.getvalue()[: data.tell() // 2])
    return ["bad.jpg"]


PREPARE = ("prepare", "--source=hdf5", "--path={folder}")
PREDICT = ("predict", "--images={folder}")
CASES: dict[Callable[[Path], list[str]], tuple[str, ...]] = {
    truncated: PREPARE,
    without_image: PREPARE,
    mask_of_another_size: PREPARE,
    empty_phrase: PREDICT,
    half_jpeg: (*PREDICT, "--phrases=[red ring]"),
}


@pytest.mark.parametrize("spoil", CASES, ids=lambda spoil: spoil.__name__)
def test_it_is_named_and_skipped_or_stops_the_job(
    spoil: Callable[[Path], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    shard(folder / "good.h5", "y")
    names = spoil(folder)
    command, *flags = (part.format(folder=folder) for part in CASES[spoil])

    assert cli.main(command, [*flags, f"--out={tmp_path / 'skip'}", "--on_error=skip"]) == cli.REFUSED_SOME
    said = capsys.readouterr().out
    assert f"{command}: 2 in, 1 out, 1 refused" in said
    (refusal,) = (line for line in said.splitlines() if "refused " in line and not line.startswith(command))
    assert [name for name in names if name not in refusal] == []

    assert cli.main(command, [*flags, f"--out={tmp_path / 'stop'}", "--on_error=stop"]) == cli.FAILED
    (complaint,) = capsys.readouterr().err.strip().splitlines()
    assert [name for name in names if name not in complaint] == []
    assert not (tmp_path / "stop" / "_SUCCESS.json").exists()


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for path in (out / "data").glob("*.parquet") for row in pq.read_table(path).to_pylist()]


def test_an_empty_mask_is_no_error_but_kept_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = tmp_path / "samples"
    begin(samples, {})
    shard(samples / "a.h5", "x", mask=np.zeros(SCENE.image.shape[:2], np.uint8))
    hdf5.build_index(samples)
    finish(samples, {}, {"rows_in": 1})
    assert cli.main("refine", [f"--samples={samples}", f"--out={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().out
    assert "1 in, 1 out, 0 refused" in said
    assert "kept: empty: 1" in said
    assert "on 1 worker, CPU, fp32" in said


def test_a_picture_of_one_pixel_gets_a_mask_of_one_pixel(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (200, 0, 0)).save(tmp_path / "dot.png")
    flags = [f"--images={tmp_path / 'dot.png'}", "--phrases=[red ring]", f"--out={tmp_path / 'out'}"]
    assert cli.main("predict", flags) == 0
    (row,) = rows(tmp_path / "out")
    assert (row["height"], row["width"], row["outcomes"]) == (1, 1, ["ok"])
    assert row["areas"][0] in (0, 1)
