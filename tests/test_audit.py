"""audit.py: counts against counting by hand, and shared pictures against naive code and copies made here."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import imagehash
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images

from rlfseg import audit, images
from rlfseg.audit import Contents, Looks, Pair, look, shared
from rlfseg.datasets.shapes import draw_scene
from rlfseg.errors import BadSample
from rlfseg.hdf5 import Labelled, Sample, Seen

Picture = NDArray[np.uint8]


# --- contents --------------------------------------------------------------------------------------------------------


def seen(sample_id: str, *, file: str = "a.h5", areas: dict[str, int], size: tuple[int, int] = (10, 100)) -> Seen:
    return Seen(
        file=file,
        id=sample_id,
        size=size,
        captions=tuple(areas),
        areas=tuple(areas.values()),
        instances=(None,) * (len(areas) - 1) + (3,) * bool(areas),
        coco_id="7" if sample_id == "1" else None,
    )


def test_counts_are_those_by_hand() -> None:
    contents = Contents()
    contents.add(seen("1", areas={"dog": 0, "cat": 1, "sky": 1000}))
    contents.add(seen("2", areas={"dog": 2, " ": 10}))
    contents.add(seen("3", areas={"dog": 500}, size=(20, 50)))
    contents.add(seen("4", areas={}, size=(40, 80)))
    contents.add(BadSample("no mask", file="b.h5", sample="9"))
    counts = contents.as_dict()
    assert (counts["images"], counts["phrases"], counts["images_with_coco_id"]) == (4, 6, 1)
    assert counts["height"] == {"min": 10, "median": 10, "max": 40}
    assert counts["width"] == {"min": 50, "median": 80, "max": 100}
    assert counts["phrases_per_image"] == {"min": 0, "median": 1, "max": 3}
    assert counts["captions"] == {"distinct": 4, "longest": 3}
    assert counts["frequent_captions"]["dog"] == 3
    # shares of the image: 0, 0.001, 1; 0.002, 0.01; 0.5
    by_share = {"empty": 1, "to 0.1 %": 1, "to 1 %": 2, "to 10 %": 0, "to 50 %": 1, "over 50 %": 1}
    assert counts["masks_by_share_of_image"] == by_share
    assert counts["objects_per_phrase"] == {"min": 3, "median": 3, "max": 3}
    assert counts["notes"] == {
        "masks that cover the whole image": 1,
        "empty phrases (they can't be asked)": 1,
        "images without phrases": 1,
    }
    assert counts["problems"] == ["b.h5 [9]: no mask"]


def test_an_id_in_two_files_is_a_problem() -> None:
    contents = Contents()
    contents.add(seen("1", areas={"dog": 1}))
    contents.add(seen("1", file="b.h5", areas={"dog": 1}))
    assert list(map(str, contents.problems)) == ["b.h5 [1]: this id is in a.h5 too"]


def test_nothing_has_no_median() -> None:
    counts = Contents().as_dict()
    assert (counts["images"], counts["height"], counts["captions"]["longest"]) == (0, {}, 0)


@pytest.mark.parametrize(("values", "median"), [([5], 5), ([1, 9], 1), ([1, 2, 9], 2), ([1, 1, 1, 9], 1)])
def test_the_median_is_one_of_the_values(values: list[int], median: int) -> None:
    contents = Contents()
    for n, value in enumerate(values):
        contents.add(seen(str(n), areas={}, size=(value, 1)))
    assert contents.as_dict()["height"]["median"] == median


def test_a_contact_sheet_of_large_and_thin_pictures_stays_small() -> None:
    samples = []
    for size in ((3000, 4000), (1, 600), (600, 1), (64, 64), (5, 5)):
        mask = np.zeros(size, np.uint8)
        mask[: size[0] // 2] = 1
        phrases = tuple(Labelled(caption=f"{n}", mask=mask) for n in range(30))
        samples.append(Sample(id="x", image=np.full((*size, 3), 200, np.uint8), phrases=phrases))
    sheet = audit.contact_sheet(samples)
    assert sheet.shape[1] == 4 * (384 + 10) + 10
    assert sheet.shape[0] < 4000
    assert np.unique(sheet.reshape(-1, 3), axis=0).shape[0] > 50  # masks are tinted


# --- pictures that two sets share ------------------------------------------------------------------------------------


def looks_of(pictures: list[Picture], coco_ids: list[str | None] | None = None, prefix: str = "") -> Looks:
    hashes, thumbnails = zip(*(look(p) for p in pictures), strict=True)
    return Looks(
        ids=[f"{prefix}{n}" for n in range(len(pictures))],
        coco_ids=coco_ids or [None] * len(pictures),
        hashes=np.array(hashes, np.uint64),
        thumbnails=np.stack([np.frombuffer(t, np.uint8) for t in thumbnails]),
    )


def jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    def store(image: Image.Image) -> Image.Image:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality)
        return Image.open(stream)

    return store


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "the same": lambda i: i,
    "poor JPEG": jpeg(30),
    "half": lambda i: jpeg(60)(i.resize((i.width // 2, i.height // 2))),
    "stretched": lambda i: i.resize((300, 300)),
    "grey": lambda i: i.convert("L"),
    "bright": lambda i: ImageEnhance.Brightness(i).enhance(1.2),
}


def photographs() -> list[Picture]:
    """Two photographs, cut into eight pictures."""
    parts = []
    for photo in load_sample_images().images:
        for y, x in ((0, 0), (0, 320), (210, 0), (210, 320)):
            parts.append(np.ascontiguousarray(photo[y : y + 210, x : x + 320]))
    return parts


def test_a_look_is_imagehash_and_a_thumbnail() -> None:
    picture = photographs()[0]
    hashed, thumbnail = look(picture)
    truth = imagehash.phash(Image.fromarray(picture))
    assert f"{hashed:016x}" == str(truth)
    other = look(photographs()[3])[0]
    assert (hashed ^ other).bit_count() == truth - imagehash.phash(Image.fromarray(photographs()[3]))
    assert len(thumbnail) == 32 * 32
    assert abs(np.frombuffer(thumbnail, np.uint8).mean() - np.asarray(Image.fromarray(picture).convert("L")).mean()) < 1


@pytest.mark.parametrize("copy", COPIES)
def test_copies_are_found_and_others_are_not(copy: str) -> None:
    pictures = photographs()
    copies = [np.asarray(COPIES[copy](Image.fromarray(p)).convert("RGB")) for p in pictures[::2]]
    pairs = shared(looks_of(pictures), looks_of(copies, prefix="t"), distance=10, similarity=0.9)
    assert [(p.train, p.test, p.how) for p in pairs] == [(str(2 * n), f"t{n}", "picture") for n in range(4)]


def test_what_is_shared_equals_naive_code() -> None:
    """Drawn scenes are alike enough that some are candidates and not confirmed."""
    ours = [draw_scene(n, split="train").image for n in range(60)]
    theirs = [draw_scene(n, split="test").image for n in range(40)] + ours[7:9]
    a, b = looks_of(ours), looks_of(theirs)
    bits = np.array([[(int(x) ^ int(y)).bit_count() for y in b.hashes] for x in a.hashes])
    alike = np.corrcoef(a.thumbnails, b.thumbnails)[:60, 60:]
    for distance, similarity in ((10, 0.9), (24, 0.5), (64, 0.3), (0, 0.0)):
        naive = {n: np.where((bits[n] <= distance) & (alike[n] >= similarity), alike[n], -2) for n in range(60)}
        wanted = [(str(n), str(int(row.argmax()))) for n, row in naive.items() if row.max() > -2]
        found = shared(a, b, distance=distance, similarity=similarity)
        assert [(p.train, p.test) for p in found] == wanted
        for pair in found:
            assert pair.distance == bits[int(pair.train), int(pair.test)]
            assert pair.similarity == pytest.approx(alike[int(pair.train), int(pair.test)], abs=1e-4)
    assert len(shared(a, b, distance=24, similarity=0.0)) > len(shared(a, b, distance=24, similarity=0.5))


def test_a_coco_id_tells_where_pictures_do_not() -> None:
    pictures = photographs()
    a, b = looks_of(pictures[:3], ["30", None, "5"]), looks_of(pictures[5:], [None, "30", "6"], prefix="t")
    (pair,) = shared(a, b, distance=10, similarity=0.9)
    assert (pair.train, pair.test, pair.how) == ("0", "t1", "coco_id")
    assert pair.distance > 10


def test_flat_pictures_have_nothing_to_compare() -> None:
    flat = [np.full((50, 60, 3), grey, np.uint8) for grey in (0, 90, 255)]
    assert shared(looks_of(flat), looks_of(flat), distance=64, similarity=0.01) == []


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = photographs()
    whole = shared(looks_of(pictures), looks_of(pictures), distance=10, similarity=0.9)
    monkeypatch.setattr(audit, "BLOCK", 3)
    assert shared(looks_of(pictures), looks_of(pictures), distance=10, similarity=0.9) == whole
    assert whole == [Pair(train=str(n), test=str(n), how="picture", distance=0, similarity=1.0) for n in range(8)]


def test_real_photographs(shared_data: Path) -> None:
    """124 photographs against poor copies of half their size of every third, and 80 others."""
    paths = images.list_images(shared_data / "coco_photos" / "images")
    pictures = [images.load_image(p, name=str(p)) for p in paths]
    copies = [np.asarray(COPIES["half"](Image.fromarray(p)).convert("RGB")) for p in pictures[::3]]
    pairs = shared(looks_of(pictures), looks_of(copies), distance=10, similarity=0.9)
    assert [(p.train, p.test) for p in pairs] == [(str(3 * n), str(n)) for n in range(len(copies))]
