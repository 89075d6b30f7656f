"""Many files, many processes, and the index over them."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from torch.utils.data import DataLoader

from rlfseg import hdf5
from rlfseg.errors import BadSample, DataError
from rlfseg.hdf5 import Labelled, Reader, Sample
from tests.samples import assert_same, mask_of, picture, run_limited, sample

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


# --- many shards, many processes -------------------------------------------------------------------------------------


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
