"""Real photographs through `predict` and the Python API: none is lost, and masks have the photograph's own size.

What the masks say is no matter: the shipped model knows drawn scenes alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image, ImageOps

from rlfseg import cli
from rlfseg.images import rle_decode
from rlfseg.results import unnest
from rlfseg.segmenter import Segmenter

PHRASES = ["person", "red ring"]


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter.load("tiny", device="cpu")


def kind(path: Path) -> tuple[str, tuple[int, int]]:
    with Image.open(path) as image:
        return image.mode, image.size


def assert_all_are_segmented(photographs: list[Path], segmenter: Segmenter, folder: Path) -> None:
    (folder / "in").mkdir()
    for path in photographs:
        shutil.copy(path, folder / "in")
    flags = [f"--images={folder / 'in'}", f"--phrases=[{', '.join(PHRASES)}]", f"--out={folder / 'out'}"]
    assert cli.main("predict", [*flags, "--device=cpu"]) == 0
    table = unnest(folder / "out")
    found = {Path(name).name: rows for name, rows in table.groupby("id")}
    assert sorted(found) == sorted(path.name for path in photographs)
    for path in photographs:
        rows, results = found[path.name], segmenter(path, PHRASES)
        with Image.open(path) as image:
            size = ImageOps.exif_transpose(image).size[::-1]
        assert rows["caption"].tolist() == [r.caption for r in results] == PHRASES
        for row, result in zip(rows.itertuples(), results, strict=True):
            assert (row.height, row.width) == result.mask.shape == size
            mask = rle_decode(row.mask, size)
            assert mask.sum() == row.area
            assert (mask != result.mask).mean() < 1e-3  # another batch rounds otherwise


@pytest.mark.usefixtures("ray")
def test_the_two_photographs_that_every_clone_has(segmenter: Segmenter, tmp_path: Path) -> None:
    photographs = sorted(Path(sklearn.datasets.__file__).parent.glob("images/*.jpg"))
    assert [p.name for p in photographs] == ["china.jpg", "flower.jpg"]
    assert_all_are_segmented(photographs, segmenter, tmp_path)


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_photographs_of_many_sizes_and_modes(
    shared_data: Path, segmenter: Segmenter, tmp_path: Path, every: int
) -> None:
    photographs = sorted((shared_data / "coco_photos" / "images").iterdir())
    assert len(photographs) == 124
    kinds = [kind(p) for p in photographs]
    share = [n for n, (mode, _) in enumerate(kinds) if n % every == 0 or mode != "RGB"]
    assert len({kinds[n] for n in share}) > 5
    assert {kinds[n][0] for n in share} == {"RGB", "L"}
    assert_all_are_segmented([photographs[n] for n in share], segmenter, tmp_path)


def test_an_array_of_a_photograph_gives_what_its_file_gives(segmenter: Segmenter) -> None:
    image = sklearn.datasets.load_sample_image("china.jpg")
    path = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"
    of_array, of_file = (segmenter(given, PHRASES) for given in (np.ascontiguousarray(image), path))
    for a, b in zip(of_array, of_file, strict=True):
        assert a.mask.shape == (427, 640)
        np.testing.assert_array_equal(a.score, b.score)
