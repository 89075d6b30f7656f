"""What an HDF5 file declares is not believed: each hostile one is refused by name, within bounds."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from rlfseg import hdf5
from rlfseg.errors import BadSample
from tests.samples import mask_of, picture, run_limited, sample

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
