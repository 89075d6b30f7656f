"""hdf5/child.py: whatever a file does to libhdf5 happens to a child, and is an error with the file and the sample."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from rlfseg import hdf5
from rlfseg.errors import BadSample, ResourceError
from rlfseg.hdf5 import Labelled, Sample, Seen, child

IMAGE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
MASK = np.zeros((30, 40), np.uint8)
MASK[3:9, 5:7] = 1
OBJECTS = np.stack([MASK, MASK])
OBJECTS[1, 3:8] = 0


def write(path: Path, *ids: str, coco_id: str | None = None) -> Path:
    phrases = (
        Labelled(caption="a/b é\0", mask=MASK, instances=OBJECTS),
        Labelled(caption="a/b é\0", mask=1 - MASK),
    )
    samples = [Sample(id=i, image=IMAGE, phrases=phrases, coco_id=coco_id) for i in ids]
    hdf5.write_shard(path, samples)
    return path


def said(*files: Path, **limits: float) -> list[Seen | str]:
    found = list(hdf5.preflight(files, **limits))  # type: ignore[arg-type]
    return [str(f) if isinstance(f, BadSample) else f for f in found]


def test_what_is_seen_is_what_was_written(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.h5", "1", "x/y", coco_id="581857"), write(tmp_path / "b.h5", "2")
    facts = {"size": (30, 40), "captions": ("a/b é\0",) * 2, "areas": (12, 1188), "instances": (2, None)}
    assert said(a, b) == [
        Seen(file=str(a), id="1", coco_id="581857", **facts),
        Seen(file=str(a), id="x/y", coco_id="581857", **facts),
        Seen(file=str(b), id="2", coco_id=None, **facts),
    ]


def test_the_index_and_the_sample_keep_the_coco_id(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", "1", coco_id="581857")
    assert hdf5.build_index(tmp_path)["coco_id"].to_pylist() == ["581857"]
    assert hdf5.read_sample(tmp_path / "a.h5", "1").coco_id == "581857"


def test_one_bad_file_does_not_hide_the_next(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.h5", "1")
    (tmp_path / "half.h5").write_bytes(whole.read_bytes()[:3000])
    (tmp_path / "empty.h5").touch()
    found = said(tmp_path / "half.h5", tmp_path / "gone.h5", tmp_path / "empty.h5", whole)
    assert [f if isinstance(f, str) else f.id for f in found] == [
        found[0],
        f"{tmp_path / 'gone.h5'}: no such file",
        found[2],
        "1",
    ]
    assert "half.h5: not a whole HDF5 file" in str(found[0])
    assert "empty.h5: not a whole HDF5 file" in str(found[2])


# --- what no exception can tell --------------------------------------------------------------------------------------


def child_that(does: str) -> str:
    """The real child, to which something happens when it reads the sample `poison`."""
    return f"""
import os, signal, ctypes
from rlfseg.hdf5 import reading
from rlfseg.hdf5.child import main
whole = reading.sample_in
def poisoned(file, sample_id, place):
    if sample_id == "poison":
        {does}
    return whole(file, sample_id, place)
reading.sample_in = poisoned
main()
"""


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("ctypes.string_at(8)", r"crashed \(SIGSEGV\)"),
        ("os.abort()", r"crashed \(SIGABRT\)"),
        ("os._exit(7)", r"failed \(nothing said\)"),
        ("raise AttributeError('of h5py')", r"failed \(AttributeError: of h5py\)"),
        ("ctypes.CDLL(None).pause()", r"took longer than 2 s"),
    ],
)
def test_a_death_is_named_and_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, reason: str
) -> None:
    monkeypatch.setattr(child, "CHILD", child_that(does))
    bad, good = write(tmp_path / "a.h5", "0", "poison"), write(tmp_path / "b.h5", "2", "3")
    found = list(hdf5.preflight([bad, good], seconds=2, memory=1 << 30))
    errors = [f for f in found if isinstance(f, BadSample)]
    assert [(e.file, e.sample) for e in errors] == [(str(bad), None)]  # the file isn't read on
    with pytest.raises(BadSample, match=rf"a\.h5: reading its sample 'poison' {reason}"):
        raise errors[0]
    assert [f.id for f in found if isinstance(f, Seen)] == ["0", "2", "3"]


def test_a_sample_that_takes_all_memory_is_only_one_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "CHILD", child_that("bytearray(1 << 34)"))
    error, seen = said(write(tmp_path / "a.h5", "poison", "z"), memory=1 << 30)
    assert "a.h5 [poison]: reading needs more memory than 1,024 MiB" in str(error)
    assert isinstance(seen, Seen)


def test_a_file_that_never_opens_is_a_hang(tmp_path: Path) -> None:
    """A named pipe that nobody writes to: libhdf5 waits in `open` for ever, with no Python running."""
    os.mkfifo(tmp_path / "a.h5")
    good = write(tmp_path / "b.h5", "2")
    start = time.monotonic()
    (error, seen) = said(tmp_path / "a.h5", good, seconds=1)
    assert "a.h5: reading took longer than 1 s" in str(error)
    assert isinstance(seen, Seen)
    assert time.monotonic() - start < 60


def test_a_bomb_costs_the_parent_nothing(tmp_path: Path) -> None:
    """Contiguous images that the file only declares, and a chunk of zeros that unpacks to a gigabyte."""
    path = write(tmp_path / "a.h5", "1", "2")
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(1000)) + packer.flush()
    with h5py.File(path, "a") as file:
        del file["1/mask/a%2Fb é%00"]
        mask = file.create_dataset("1/mask/x", (30, 40), "u1", chunks=(30, 40), compression="gzip")
        mask.id.write_direct_chunk((0, 0), bomb)
    error, seen = said(path, memory=200 << 20)
    assert "a.h5 [1]: the mask of 'x' is damaged" in str(error)
    assert isinstance(seen, Seen)


def test_a_child_that_cannot_start_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "CHILD", "raise ImportError('no h5py')")
    with pytest.raises(ResourceError, match="can't be started: ImportError: no h5py"):
        said(write(tmp_path / "a.h5", "1"))


def test_the_child_is_gone_when_the_reader_stops_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    class Noted(popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: object, **options: object):
            super().__init__(*arguments, **options)  # type: ignore[call-overload]
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    flight = hdf5.preflight([write(tmp_path / "a.h5", *map(str, range(50)))])
    assert next(iter(flight))
    flight.close()  # type: ignore[attr-defined]
    assert [p.poll() is not None for p in started] == [True]


def test_nothing_is_imported_from_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of downloads may hold a file named like a module."""
    (tmp_path / "h5py.py").write_text("raise SystemExit('imported from the folder of strangers')")
    path = write(tmp_path / "a.h5", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert [f.id for f in said(Path(path.name)) if isinstance(f, Seen)] == ["1"]


# --- digests ---------------------------------------------------------------------------------------------------------


def test_one_flipped_bit_anywhere_in_a_sample_is_found(tmp_path: Path) -> None:
    """HDF5 keeps no checksum of contiguous data: only the digest tells."""
    path = write(tmp_path / "a.h5", "1")
    whole = path.read_bytes()
    at = whole.index(IMAGE.tobytes())
    for offset in (0, 1777, IMAGE.nbytes - 1):
        path.write_bytes(whole[: at + offset] + bytes([whole[at + offset] ^ 4]) + whole[at + offset + 1 :])
        assert hdf5.read_sample(path, "1").image.shape == (30, 40, 3)  # a plain reader can't know
        assert "doesn't match its digest" in str(said(path)[0])


@pytest.mark.parametrize("changed", ["caption", "mask", "coco_id", "task"])
def test_any_change_by_hand_is_found(tmp_path: Path, changed: str) -> None:
    path = write(tmp_path / "a.h5", "1", coco_id="7")
    with h5py.File(path, "a") as file:
        mask = next(m for m in file["1/mask"].values() if m[0, 0])
        if changed == "mask":
            mask[0, 0] = 0
        elif changed == "coco_id":
            file["1"].attrs["coco_id"] = "8"
        else:
            mask.attrs[changed] = "other"
    assert "[1]: was changed or damaged since it was written" in str(said(path)[0])


def test_files_without_digests_are_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["3/image"], file["3/mask/white/black dog"] = IMAGE, MASK
    (seen,) = said(tmp_path / "a.h5")
    assert isinstance(seen, Seen)
    assert (seen.id, seen.captions, seen.areas, seen.instances) == ("3", ("white/black dog",), (12,), (None,))


def test_an_id_that_comes_twice_is_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name in ("a%2Fb", "a/b"):
            file[f"{name}/image"], file[f"{name}/mask/x"] = IMAGE, MASK
        file["a%2Fb"].attrs["id"] = "a/b"
    assert sorted(f.id if isinstance(f, Seen) else f for f in said(tmp_path / "a.h5")) == [
        f"{tmp_path / 'a.h5'} [a/b]: this id is in the file twice",
        "a/b",
    ]


# --- while somebody else writes --------------------------------------------------------------------------------------


@pytest.mark.fault("h5-io-04")
def test_readers_see_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    """A shard is written anew, again and again, while another process reads it: every sample is of one version."""
    path = tmp_path / "a.h5"

    def version(n: int) -> list[Sample]:
        mask = np.full((64, 64), n % 2, np.uint8)
        phrases = tuple(Labelled(caption=f"{k}", mask=mask) for k in range(3))
        return [Sample(id=i, image=np.full((64, 64, 3), n, np.uint8), phrases=phrases) for i in "abc"]

    hdf5.write_shard(path, version(0))
    code = """
import sys
from rlfseg import hdf5
versions = set()
print("reading", flush=True)
while 30 not in versions:
    reader = hdf5.Reader(sys.argv[1])
    for _ in range(3):
        read = [reader.sample("a.h5", i) for i in "abc"]
        n = {int(s.image.min()) for s in read} | {int(s.image.max()) for s in read}
        assert len(n) == 1, n
        assert {int(p.mask.min()) for s in read for p in s.phrases} == {n.copy().pop() % 2}
        versions |= n
    reader.close()
print(len(versions))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
        assert reader.stdout
        assert reader.stdout.readline() == "reading\n"
        for n in range(1, 31):
            hdf5.write_shard(path, version(n))
        said, complaints = reader.communicate(timeout=60)
    assert reader.returncode == 0, complaints
    assert int(said) >= 2


@pytest.mark.fault("h5-io-04")
def test_a_file_that_another_program_has_open_is_read_and_never_written(tmp_path: Path) -> None:
    """h5py's own lock makes a plain reader fail with errno 11; ours takes no lock and opens for reading alone."""
    path = write(tmp_path / "a.h5", "1")
    before = path.read_bytes()
    code = "import sys, h5py; f = h5py.File(sys.argv[1], 'a'); print('open', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdin
        assert writer.stdout
        assert writer.stdout.readline() == "open\n"
        assert hdf5.read_sample(path, "1").id == "1"
        assert isinstance(said(path)[0], Seen)
        writer.stdin.close()
    assert path.read_bytes() == before
    path.chmod(0o444)
    assert hdf5.read_sample(path, "1").id == "1"
