"""hdf5: any caption comes back exactly, the authors' files are read, and no file is believed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from rlfseg import hdf5
from rlfseg.errors import BadSample, DataError, ResourceError
from rlfseg.hdf5 import Labelled, Reader, Sample

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


def picture(height: int = 5, width: int = 7, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def mask_of(number: int, height: int = 5, width: int = 7) -> NDArray[np.uint8]:
    """A mask that holds a number in its bits."""
    bits = [number >> k & 1 for k in range(height * width)]
    return np.array(bits, np.uint8).reshape(height, width)


def sample(*captions: str, id: str = "100", **labelled: Any) -> Sample:
    phrases = tuple(Labelled(caption=c, mask=mask_of(n + 1), **labelled) for n, c in enumerate(captions))
    return Sample(id=id, image=picture(), phrases=phrases)


def assert_same(read: Sample, written: Sample) -> None:
    assert read.id == written.id
    assert read.image.dtype == np.uint8
    assert np.array_equal(read.image, written.image)
    assert [p.caption for p in read.phrases] == [p.caption for p in written.phrases]
    assert [p.task for p in read.phrases] == [p.task for p in written.phrases]
    for mine, theirs in zip(read.phrases, written.phrases, strict=True):
        assert mine.mask.dtype == np.uint8
        assert np.array_equal(mine.mask, theirs.mask)
        assert (mine.instances is None) == (theirs.instances is None)
        assert theirs.instances is None or np.array_equal(mine.instances, theirs.instances)


@pytest.fixture
def authors(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes a file as the paper's appendix has it: names as they are, no attributes."""

    def write(tree: dict[str, Any]) -> Path:
        path = tmp_path / "authors.h5"
        with h5py.File(path, "w") as file:
            for name, data in tree.items():
                file[name] = data
        return path

    return write


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


def run_limited(code: str, *arguments: object, memory: int = 6 << 30) -> str:
    """Runs code in a process of its own with little memory, and gives what it printed."""
    limited = f"import resource\nresource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))\n{textwrap.dedent(code)}"
    command = [sys.executable, "-W", "error", "-c", limited, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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


# --- suspicion -------------------------------------------------------------------------------------------------------


Hostile = Callable[[h5py.Group, Path], None]


def replace(group: h5py.Group, name: str, *arguments: Any, **options: Any) -> h5py.Dataset:
    del group[name]
    return group.create_dataset(name, *arguments, **options)


def _external_data(group: h5py.Group, folder: Path) -> None:
    (folder / "secret").write_bytes(bytes(105))
    replace(group, "image", (5, 7, 3), "u1", external=[(str(folder / "secret"), 0, 105)])


def _virtual(group: h5py.Group, folder: Path) -> None:
    layout = h5py.VirtualLayout((5, 7), "u1")
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "x", (5, 7))
    del group["mask/dog"]
    group.create_virtual_dataset("mask/dog", layout)


def _link(name: str, link: Any) -> Hostile:
    def put(group: h5py.Group, _: Path) -> None:
        del group[name]
        group[name] = link

    return put


def _circle(group: h5py.Group, _: Path) -> None:
    group["mask/a"] = group["mask"]


def _filtered(name: str, *filters: tuple[int, tuple[int, ...]], shape: tuple[int, ...] = (5, 7)) -> Hostile:
    """Filters that h5py's own front door doesn't combine."""

    def put(group: h5py.Group, _: Path) -> None:
        del group[name]
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk(shape)
        for number, values in filters:
            properties.set_filter(number, h5py.h5z.FLAG_OPTIONAL, values)
        space = h5py.h5s.create_simple(shape)
        dataset = h5py.h5d.create(group.id, name.encode(), h5py.h5t.NATIVE_UINT8, space, properties)
        h5py.Dataset(dataset)[...] = 0

    return put


def _data(name: str, *arguments: Any, **options: Any) -> Hostile:
    return lambda group, _: (replace(group, name, *arguments, **options), None)[1]


def _one_chunk_of_two(group: h5py.Group, _: Path) -> None:
    mask = replace(group, "mask/dog", (5, 7), "u1", chunks=(5, 4))
    mask[:, :4] = 1


def _stray_instances(group: h5py.Group, _: Path) -> None:
    group["instances/dog"] = mask_of(2)[None]


def _bomb(group: h5py.Group, _: Path) -> None:
    """35 bytes are declared, a billion would come."""
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(1000)) + packer.flush()
    mask = replace(group, "mask/dog", (5, 7), "u1", chunks=(5, 7), compression="gzip")
    mask.id.write_direct_chunk((0, 0), bomb)


def _short(group: h5py.Group, _: Path) -> None:
    mask = replace(group, "mask/dog", (5, 7), "u1", chunks=(5, 7), compression="gzip")
    mask.id.write_direct_chunk((0, 0), zlib.compress(bytes(34)))


def _declared(group: h5py.Group, name: str, shape: tuple[int, ...], stored: int) -> None:
    """One chunk of `shape` that takes `stored` bytes; whether they unpack isn't looked at before it is read."""
    data = replace(group, name, shape, "u1", chunks=shape, compression="gzip")
    data.id.write_direct_chunk((0,) * len(shape), bytes(stored))


def _many_large_masks(group: h5py.Group, _: Path) -> None:
    """243 MB of picture and eleven masks of 81 MB: each is allowed, 1,134 MB are not."""
    _declared(group, "image", (9000, 9000, 3), 240_000)
    for n in range(11):
        group[f"mask/{n}"] = 0
        _declared(group, f"mask/{n}", (9000, 9000), 80_000)
    del group["mask/dog"]


def _image_group(group: h5py.Group, _: Path) -> None:
    del group["image"]
    group.create_group("image")


REFUSED: dict[str, tuple[Hostile, str]] = {
    "external data": (_external_data, "the image keeps its data in another file"),
    "virtual": (_virtual, "the mask of 'dog' keeps its data in another file"),
    "soft link": (_link("image", h5py.SoftLink("/2/image")), "'image' is a soft or external link"),
    "dangling soft link": (_link("mask", h5py.SoftLink("/gone")), "'mask' is a soft or external link"),
    "external link": (_link("mask/dog", h5py.ExternalLink("/etc/passwd", "/")), "'dog' is a soft or external link"),
    "circle": (_circle, "'a/a' is a group that lies elsewhere"),
    "fletcher32": (_data("mask/dog", data=mask_of(1), fletcher32=True), r"uses HDF5 filters \[3\]"),
    "scale-offset": (_data("mask/dog", data=mask_of(1), scaleoffset=0), r"uses HDF5 filters \[6\]"),
    "plugin": (_filtered("mask/dog", (32015, ())), r"uses HDF5 filters \[32015\]"),
    "gzip of gzip": (_filtered("mask/dog", (1, (9,)), (1, (9,))), r"uses HDF5 filters \[1, 1\]"),
    "a bomb of a chunk": (_bomb, "the mask of 'dog' is damaged: a chunk doesn't unpack to its size"),
    "a short chunk": (_short, "the mask of 'dog' is damaged: a chunk doesn't unpack to its size"),
    "object type": (_data("image", (5, 7, 3), h5py.string_dtype()), "the image has type object"),
    "ragged type": (_data("image", (5, 7, 3), h5py.vlen_dtype("u1")), "the image has type object"),
    "reference": (_data("mask/dog", (5, 7), h5py.ref_dtype), "the mask of 'dog' has type object"),
    "compound": (_data("mask/dog", data=np.zeros((5, 7), "u1,u1")), "the mask of 'dog' has type"),
    "float image": (_data("image", data=picture() / 255), r"the image must be uint8 \[H, W, 3\], this is float64"),
    "grey image": (_data("image", data=picture()[..., 0]), r"the image must be .* this is uint8 \[5, 7\]"),
    "four channels": (_data("image", data=np.zeros((5, 7, 4), "u1")), r"the image must be .* \[5, 7, 4\]"),
    "scalar": (_data("mask/dog", data=1), r"the mask of 'dog' must be \[5, 7\] like the image"),
    "null": (_data("mask/dog", data=h5py.Empty("u1")), "the mask of 'dog' is not a data set with data"),
    "other size": (_data("mask/dog", data=mask_of(1, 7, 5)), r"must be \[5, 7\] like the image, this is \[7, 5\]"),
    "other values": (_data("mask/dog", data=mask_of(1) * 7), "only 0 and 255; this one holds 0, 7"),
    "nan": (_data("mask/dog", data=mask_of(1) * np.nan), "a mask must hold only"),
    "huge": (
        _data("mask/dog", (1 << 20, 1 << 20), "u1", chunks=(1 << 10, 1 << 10)),
        "declares 1,099,511,627,776 bytes",
    ),
    "huge chunk": (
        _data("mask/dog", (5, 7), "u1", chunks=(1 << 15, 1 << 15), maxshape=(None, None)),
        "in chunks of 1,073,741,824; the limit is",
    ),
    "packed too well": (
        lambda group, _: _declared(group, "mask/dog", (1000, 1101), 1000),
        "the mask of 'dog' unpacks 1,000 bytes into 1,101,000; more than 1100 times is refused",
    ),
    "packed too badly": (
        lambda group, _: _declared(group, "mask/dog", (5, 7), (1 << 20) + 40),
        "the mask of 'dog' claims that its 35 bytes are packed into 1,048,616",
    ),
    "large in all": (_many_large_masks, "declares 1,134,000,000 bytes in all; the limit is 1,073,741,824"),
    "never written": (_data("image", (5, 7, 3), "u1"), "the image was never written"),
    "half written": (_one_chunk_of_two, "the mask of 'dog' is unfinished: 1 of its 2 chunks"),
    "no image": (lambda group, _: group.__delitem__("image"), "the image is not a data set"),
    "no mask": (lambda group, _: group.__delitem__("mask"), "has no group 'mask'"),
    "mask is data": (_data("mask", data=mask_of(1)), "has no group 'mask'"),
    "image is a group": (_image_group, "the image is not a data set"),
    "instances that differ": (_stray_instances, "the instances of 'dog' don't add up"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_hostile_sample_is_refused_by_name(tmp_path: Path, case: str) -> None:
    spoil, reason = REFUSED[case]
    path = tmp_path / "a.h5"
    hdf5.write_shard(path, [sample("dog", id="1"), sample("cat", id="2")])
    with h5py.File(path, "a") as file:
        spoil(file["1"], tmp_path)
    with pytest.raises(BadSample, match=reason) as caught:
        hdf5.read_sample(path, "1")
    assert (caught.value.file, caught.value.sample) == (str(path), "1")
    assert hdf5.read_captions(path, "2") == ("cat",)


def test_just_within_the_limits_of_packing_is_read_on(tmp_path: Path) -> None:
    """These are refused for their pixels, not for what they declare."""
    for shape, stored in (((1000, 1100), 1000), ((5, 7), (1 << 20) + 39)):
        hdf5.write_shard(tmp_path / "a.h5", [sample("dog", id="1")])
        with h5py.File(tmp_path / "a.h5", "a") as file:
            _declared(file["1"], "mask/dog", shape, stored)
        with pytest.raises(BadSample, match=r"damaged|must be \[5, 7\] like the image"):
            hdf5.read_sample(tmp_path / "a.h5", "1")


def test_links_between_samples_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    hdf5.write_shard(path, [sample("dog", id="1")])
    with h5py.File(path, "a") as file:
        file["2"] = h5py.SoftLink("/1")
        file["3/4"] = h5py.ExternalLink("other.h5", "/1")
    with pytest.raises(BadSample, match="'2' is a soft or external link"):
        hdf5.read_sample(path, "2")
    with pytest.raises(BadSample, match="'4' is a soft or external link"):
        hdf5.read_image(path, "3/4")
    with pytest.raises(BadSample, match="'2' is a soft or external link"):
        list(hdf5.iter_ids(path))


def test_a_tower_of_groups_ends(authors: Callable[[dict[str, Any]], Path]) -> None:
    path = authors({"1/image": picture(), "1/mask/" + "a/" * 3000 + "dog": mask_of(1)})
    with pytest.raises(BadSample, match=r"damaged .*recursion"):
        hdf5.read_sample(path, "1")


def test_damaged_bytes_are_the_samples_error(tmp_path: Path) -> None:
    """Every byte of a small file, spoilt in turn."""
    path, written = tmp_path / "a.h5", sample("dog", id="1")
    hdf5.write_shard(path, [written])
    code = """
        import sys
        from pathlib import Path
        from rlfseg import hdf5
        from rlfseg.errors import BadSample
        path, whole = Path(sys.argv[1]), Path(sys.argv[1]).read_bytes()
        refused = 0
        for at in range(0, len(whole), 3):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1:])
            try:
                hdf5.read_sample(path, "1")
            except BadSample:
                refused += 1
        print(refused > 100)
    """
    assert run_limited(code, path) == "True\n"


def test_bombs_cost_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    hdf5.write_shard(path, [sample("dog", id=name) for name in "123"])
    with h5py.File(path, "a") as file:
        for name, case in (("1", "a bomb of a chunk"), ("2", "huge"), ("3", "huge chunk")):
            REFUSED[case][0](file[name], tmp_path)
    code = """
        import resource, sys
        from rlfseg import hdf5
        from rlfseg.errors import BadSample
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for sample_id in "123":
            try:
                hdf5.read_sample(sys.argv[1], sample_id)
            except BadSample as error:
                print(error.sample)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30 << 10
    """
    assert run_limited(code, path) == "1\n2\n3\n"


@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}, {"compression": "lzf"}, {"shuffle": True}])
@pytest.mark.parametrize("chunks", [None, True, (2, 3), (5, 7)])
@pytest.mark.parametrize("dtype", ["bool", "u1", "<u2", ">i4", "f4", "f8"])
def test_every_storage_that_is_allowed_is_read(
    tmp_path: Path, dtype: str, chunks: Any, options: dict[str, Any]
) -> None:
    path = tmp_path / "a.h5"
    noise = picture(50, 40)  # doesn't shrink: HDF5 leaves such a chunk unpacked
    with h5py.File(path, "w") as file:
        file.create_dataset("1/image", data=noise, chunks=chunks and (*noise.shape[:2], 1), **options)
        file.create_dataset(
            "1/mask/dog", data=np.tile(mask_of(7 << 20), (10, 6))[:50, :40].astype(dtype), chunks=chunks, **options
        )
        file.create_dataset("1/mask/cat", data=noise[..., 0] > 127, chunks=chunks, **{**options, "shuffle": True})
        truth = {name: mask[()].astype(np.uint8) for name, mask in file["1/mask"].items()}
    read = hdf5.read_sample(path, "1")
    assert np.array_equal(read.image, noise)
    for phrase in read.phrases:
        assert phrase.mask.dtype == np.uint8
        assert np.array_equal(phrase.mask, truth[phrase.caption])


# --- many shards, many processes -------------------------------------------------------------------------------------


N = 100


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of samples whose pixels are their id."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        hdf5.write_shard(folder / f"{shard}.h5", (numbered(n) for n in range(shard, N, 2)))
    return folder


def numbered(n: int) -> Sample:
    image = np.full((5, 7, 3), n, np.uint8)
    return Sample(id=str(n), image=image, phrases=(Labelled(caption=f"number {n} é", mask=mask_of(n)),))


def wrong(reader: Reader, n: int) -> bool:
    read = reader.sample(f"{n % 2}.h5", str(n))
    (phrase,) = read.phrases
    right = phrase.caption == f"number {n} é" and np.array_equal(phrase.mask, mask_of(n)) and (read.image == n).all()
    return not right


def count_wrong(reader: Reader, seed: int, reads: int, results: Any) -> None:
    results.put(sum(wrong(reader, int(n)) for n in np.random.default_rng(seed).integers(N, size=reads)))


@pytest.mark.fault("h5-io-01", part="pickle, DataLoader")
def test_a_reader_pickles_small_and_opens_anew(shards: Path) -> None:
    reader = Reader(shards)
    assert not wrong(reader, 3)
    packed = pickle.dumps(reader)
    assert len(packed) < 500
    assert not wrong(pickle.loads(packed), 3)  # noqa: S301
    loader = DataLoader(Numbers(reader), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert list(loader) == [False] * 10


class Numbers:
    """A data set in torch's sense."""

    def __init__(self, reader: Reader):
        self.reader = reader

    def __len__(self) -> int:
        return 10

    def __getitem__(self, n: int) -> bool:
        return wrong(self.reader, n)


@pytest.mark.fault("h5-io-02")
@pytest.mark.fault("h5-io-09")
def test_a_reader_opened_before_forks_reads_right(shards: Path) -> None:
    reader = Reader(shards, max_open=1)
    assert not wrong(reader, 1)
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    workers = [fork.Process(target=count_wrong, args=(reader, seed, 1500, results)) for seed in range(6)]
    for worker in workers:
        worker.start()
    assert not wrong(reader, 2)
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 6
    assert [results.get() for _ in workers] == [0] * 6


@pytest.mark.fault("h5-io-08")
def test_threads_open_and_read_the_same_file(shards: Path) -> None:
    code = """
        import sys
        from concurrent.futures import ThreadPoolExecutor
        from rlfseg import hdf5
        def read(k):
            ids = [str(2 * ((k + n) % 50)) for n in range(500)]
            return sum(bool((hdf5.read_sample(sys.argv[1], i).image != int(i)).any()) for i in ids)
        with ThreadPoolExecutor(8) as pool:
            print(list(pool.map(read, range(8))))
    """
    assert run_limited(code, shards / "0.h5") == f"{[0] * 8}\n"


def test_threads_share_a_reader(shards: Path) -> None:
    reader, results = Reader(shards, max_open=1), multiprocessing.SimpleQueue()
    threads = [threading.Thread(target=count_wrong, args=(reader, seed, 100, results)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results.get() for _ in threads] == [0] * 8
    reader.close()
    assert not wrong(reader, 5)


# --- the index -------------------------------------------------------------------------------------------------------


def test_the_index_has_a_row_an_image(shards: Path) -> None:
    table = hdf5.build_index(shards)
    assert table.schema == hdf5.INDEX_SCHEMA
    assert hdf5.read_index(shards).equals(table)
    rows = table.to_pylist()
    assert sorted(int(r["id"]) for r in rows) == list(range(N))
    assert [r["id"] for r in rows] == sorted((r["id"] for r in rows), key=hdf5.id_hash)
    reader = Reader(shards)
    for row in rows[:5]:
        assert reader.captions(row["shard"], row["id"]) == tuple(row["captions"])
        assert (row["height"], row["width"], row["n_phrases"]) == (5, 7, 1)
        assert row["bytes"] > 105


def test_an_index_of_files_elsewhere(authors: Callable[[dict[str, Any]], Path], tmp_path: Path) -> None:
    path = authors({"3/image": picture(), "3/mask/a/b": mask_of(1)})
    (tmp_path / "index").mkdir()
    (row,) = hdf5.build_index(tmp_path / "index", [path]).to_pylist()
    assert row["captions"] == ["a/b"]
    assert_same(Reader(tmp_path / "index").sample(row["shard"], "3"), hdf5.read_sample(path, "3"))


@pytest.mark.fault("h5-io-06", part="preflight")
def test_bad_shards_are_all_named_or_left_out(tmp_path: Path) -> None:
    for n in range(10):
        hdf5.write_shard(tmp_path / f"{n}.h5", [sample("dog", id=f"{n}-{k}") for k in range(3)])
    whole = (tmp_path / "7.h5").read_bytes()
    (tmp_path / "7.h5").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "8.h5").write_bytes(b"")
    with h5py.File(tmp_path / "9.h5", "a") as file:
        del file["9-1/image"]
    with pytest.raises(
        DataError, match=r"3 bad.*7\.h5: not a.*8\.h5: not a.*9\.h5 \[9-1\]: the image is not"
    ) as caught:
        hdf5.build_index(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / hdf5.INDEX).exists()
    bad: list[BadSample] = []
    assert hdf5.build_index(tmp_path, on_bad=bad.append).num_rows == 7 * 3 + 2
    assert [(Path(b.file).name, b.sample) for b in bad] == [("7.h5", None), ("8.h5", None), ("9.h5", "9-1")]


def test_an_id_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        hdf5.write_shard(tmp_path / f"{name}.h5", [sample("dog")])
    with pytest.raises(DataError, match=r"b.h5 \[100\]: this id is in a.h5 too"):
        hdf5.build_index(tmp_path)


def test_a_missing_or_foreign_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"index.parquet: no such file"):
        hdf5.read_index(tmp_path)
    (tmp_path / hdf5.INDEX).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"not a whole Parquet file"):
        hdf5.read_index(tmp_path)
    with pytest.raises(DataError, match="no samples in 0 HDF5 files"):
        hdf5.build_index(tmp_path)
