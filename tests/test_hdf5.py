"""HDF5 files of samples: what is written comes back, whole or not at all, whoever wrote it."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings
from numpy.typing import NDArray

from rlfseg import hdf5
from rlfseg.errors import BadSample, DataError, ResourceError
from rlfseg.hdf5 import Labelled, Sample
from tests.samples import assert_same, mask_of, picture, run_limited, sample

AWKWARD = [
    "",
    ".",
    "..",
    "./dog",
    "dog",
    "dog\0x",
    "\0",
    "/",
    "//",
    "/abs",
    "trail/",
    "a//b",
    "black/white cat",
    "100%",
    "%",
    "%%",
    "%2F",
    "%2f",
    "%%2F",
    "person",
    "person#2",
    "Dog",
    " dog ",
    "man's hat",
    "café",
    "cafe\u0301",
    "🐕‍🦺",
    "\u202eright to left",
    "x" * 70_000,
    "/" * 5_000,
    "é" * 40_000,
]
TEXT = st.one_of(st.text(), st.text("/.%#\0aA2F", max_size=8), st.sampled_from(AWKWARD))


# --- names -----------------------------------------------------------------------------------------------------------


@given(TEXT)
def test_escape_is_reversible_and_holdable(text: str) -> None:
    name = hdf5.escape(text)
    assert hdf5.unescape(name) == text
    assert name
    assert not name.startswith(".")
    assert not set(name) & {"/", "\0"}


@given(TEXT, TEXT)
def test_escape_keeps_texts_apart(one: str, other: str) -> None:
    assert (hdf5.escape(one) == hdf5.escape(other)) == (one == other)


@pytest.mark.parametrize("caption", ["man's hat", "café", "50% off", "person#2", "a.b", "%zz", "🐕"])
def test_plain_captions_are_their_own_names(caption: str) -> None:
    assert hdf5.escape(caption) == caption


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.fault("h5-key-03")
@settings(max_examples=60)
@given(st.lists(TEXT, max_size=6), TEXT, st.one_of(st.none(), TEXT))
@example(AWKWARD, "a/b", "1__2")
@example(AWKWARD[::-1], "", None)
@example(["person", "person", "person#2", "person"], ".", "")
def test_any_caption_comes_back(tmp_path_factory: Any, captions: list[str], sample_id: str, task: str | None) -> None:
    path = tmp_path_factory.getbasetemp() / "any.h5"
    written = sample(*captions, id=sample_id, task=task)
    assert hdf5.write_shard(path, [written]) == 1
    assert_same(hdf5.read_sample(path, sample_id), written)
    assert list(hdf5.iter_ids(path)) == [sample_id]
    assert hdf5.read_captions(path, sample_id) == tuple(captions)
    assert np.array_equal(hdf5.read_image(path, sample_id), written.image)


@pytest.mark.fault("h5-key-01", part="convert")
def test_a_slash_in_a_caption_makes_no_group(tmp_path: Path) -> None:
    written = sample("black/white cat")
    hdf5.write_shard(tmp_path / "a.h5", [written])
    assert_same(hdf5.read_sample(tmp_path / "a.h5", "100"), written)
    with h5py.File(tmp_path / "a.h5") as file:
        assert [type(item) for item in file["100/mask"].values()] == [h5py.Dataset]


@pytest.mark.fault("h5-key-06")
def test_one_phrase_asked_twice_stays_two(tmp_path: Path) -> None:
    written = sample("person", "person")
    hdf5.write_shard(tmp_path / "a.h5", [written])
    read = hdf5.read_sample(tmp_path / "a.h5", "100")
    assert_same(read, written)
    assert not np.array_equal(read.phrases[0].mask, read.phrases[1].mask)
    with h5py.File(tmp_path / "a.h5") as file:
        assert list(file["100/mask"]) == ["person", "person#2"]


@pytest.mark.fault("h5-key-05")
def test_names_in_other_encodings_and_normal_forms(tmp_path: Path, authors: Callable[[dict[Any, Any]], Path]) -> None:
    nfc, nfd = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    path = authors({"7/image": picture(), b"7/mask/caf\xe9!": mask_of(1), f"7/mask/{nfd}": mask_of(2)})
    with h5py.File(path, "a") as file:
        file[f"7/mask/{nfc}"] = mask_of(3)
        file[b"caf\xe9/image"], file[b"caf\xe9/mask/x"] = picture(), mask_of(4)
    read = {p.caption: p.mask for p in hdf5.read_sample(path, "7").phrases}
    assert set(read) == {"café!", nfc, nfd}  # Latin-1, and two captions
    assert np.array_equal(read[nfd], mask_of(2))
    assert set(hdf5.iter_ids(path)) == {"7", "café"}
    assert hdf5.read_captions(path, "café") == ("x",)
    with pytest.raises(BadSample, match=r"\[100\]: the caption 'a\\ud800' isn't Unicode"):
        hdf5.write_shard(tmp_path / "b.h5", [sample("a\ud800")])


def test_instances_come_back(tmp_path: Path) -> None:
    objects = np.stack([mask_of(0b0111), mask_of(0b1110)])  # they overlap
    none = np.zeros((0, 5, 7), np.uint8)
    phrases = (
        Labelled(caption="a/b", mask=objects.max(axis=0), instances=objects, task="t\0"),
        Labelled(caption="a/b", mask=mask_of(1), instances=mask_of(1)[None]),
        Labelled(caption="absent", mask=mask_of(0), instances=none),
        Labelled(caption="unknown", mask=mask_of(5)),
    )
    written = Sample(id="1", image=picture(), phrases=phrases)
    hdf5.write_shard(tmp_path / "a.h5", [written], {"split": "train"})
    assert_same(hdf5.read_sample(tmp_path / "a.h5", "1"), written)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file.attrs["split"] == "train"
        assert file["1/instances/a%2Fb"].chunks == (1, 5, 7)


def test_the_papers_readers_can_read_it(tmp_path: Path) -> None:
    hdf5.write_shard(tmp_path / "a.h5", [sample("left dog", "cat")])
    with h5py.File(tmp_path / "a.h5") as file:
        assert np.array_equal(file["100"]["image"][()], picture())
        masks = {caption: mask[()] for caption, mask in file["100"]["mask"].items()}
        assert file["100/mask/cat"].compression == "gzip"
        assert file["100/mask/cat"].chunks == file["100/mask/cat"].shape
    assert set(masks) == {"left dog", "cat"}
    assert np.array_equal(masks["cat"], mask_of(2))


# --- the authors' own files ------------------------------------------------------------------------------------------


def test_the_authors_files_are_read(authors: Callable[[dict[str, Any]], Path]) -> None:
    path = authors(
        {
            "3/image": picture(),
            "3/mask/white/black dog": mask_of(1),  # HDF5 has made a group of it
            "3/mask/white/cat": mask_of(2).astype(bool),
            "3/mask/50%2Foff": mask_of(3) * 255,  # literally
            "3/mask/a#2": mask_of(4).astype(np.float32),
            "train/0004/image": picture(seed=1),
            "train/0004/mask/x": mask_of(5),
        }
    )
    read = {p.caption: p for p in hdf5.read_sample(path, "3").phrases}
    assert {c: p.mask.tobytes() for c, p in read.items()} == {
        "white/black dog": mask_of(1).tobytes(),
        "white/cat": mask_of(2).tobytes(),
        "50%2Foff": mask_of(3).tobytes(),
        "a#2": mask_of(4).tobytes(),
    }
    assert all(p.instances is None and p.task is None for p in read.values())
    assert set(hdf5.iter_ids(path)) == {"3", "train/0004"}
    assert np.array_equal(hdf5.read_image(path, "train/0004"), picture(seed=1))
    for missing in ("4", "train", "", ".", "3/mask", "3//", "train//0004"):
        with pytest.raises(BadSample, match=r"no such sample|is not a data set"):
            hdf5.read_sample(path, missing)


# --- writing whole or not at all -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Sample(id="1", image=picture()[..., 0], phrases=()), "the image must be uint8"),
        (Sample(id="1", image=picture()[:0], phrases=()), "the image must be uint8"),
        (Sample(id="1", image=picture(6), phrases=sample("dog").phrases), r"the mask of 'dog' must be .* \[6, 7\]"),
        (sample("dog", id="\ud800"), "the id .* lone surrogate"),
        (sample("dog", task="\ud800"), "the task .* lone surrogate"),
        (sample("dog", instances=mask_of(2)[None]), "the instances of 'dog' don't add up"),
        (sample("dog", instances=mask_of(1)), "the instances of 'dog' must be uint8"),
        (sample("dog", id="0"), "this id came before"),
    ],
)
def test_what_would_not_come_back_is_refused(tmp_path: Path, bad: Sample, reason: str) -> None:
    path = tmp_path / "a.h5"
    hdf5.write_shard(path, [sample("old", id="old")])
    with pytest.raises(BadSample, match=reason) as caught:
        hdf5.write_shard(path, [sample(id="0"), bad])
    assert caught.value.file == str(path)
    assert os.listdir(tmp_path) == ["a.h5"]
    assert list(hdf5.iter_ids(path)) == ["old"]


def test_a_shard_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"

    def watched() -> Iterator[Sample]:
        for n in range(3):
            yield sample("dog", id=str(n))
            assert not path.exists()
            assert not hdf5.list_shards(tmp_path)

    assert hdf5.write_shard(path, watched()) == 3
    assert hdf5.list_shards(tmp_path) == [path]

    def dies() -> Iterator[Sample]:
        yield sample("cat", id="9")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hdf5.write_shard(path, dies())
    assert os.listdir(tmp_path) == ["a.h5"]
    assert sorted(hdf5.iter_ids(path)) == ["0", "1", "2"]


def test_what_reads_back_differently_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = h5py.Group.create_dataset

    def flips(group: h5py.Group, name: str, data: NDArray[np.uint8], **options: Any) -> h5py.Dataset:
        return create(group, name, data=1 - data if "/mask" in group.name else data, **options)

    monkeypatch.setattr(h5py.Group, "create_dataset", flips)
    with pytest.raises(DataError, match=r"a.h5 \[100\]: reads back differently"):
        hdf5.write_shard(tmp_path / "a.h5", [sample("dog")])
    assert not os.listdir(tmp_path)


def test_a_full_disk_is_an_error_of_one_line(tmp_path: Path) -> None:
    code = """
        import os, resource, signal, sys
        import numpy as np
        from rlfseg import hdf5
        from rlfseg.errors import ResourceError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
        try:
            hdf5.write_shard(sys.argv[1] + "/a.h5", [hdf5.Sample(id=str(n), image=noise, phrases=()) for n in range(9)])
        except ResourceError as error:
            print(error)
    """
    assert "a.h5: can't be written" in run_limited(code, tmp_path)
    assert not os.listdir(tmp_path)
    with pytest.raises(ResourceError, match=r"gone/a\.h5: can't be written"):
        hdf5.write_shard(tmp_path / "gone" / "a.h5", [sample("dog")])
