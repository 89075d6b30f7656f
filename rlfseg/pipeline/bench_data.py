"""`rlfseg bench data`: the measures, reading HDF5 through Ray Data, and evaluation in bounded memory."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import h5py
import numpy as np
import psutil
import pyarrow as pa
import ray
from numpy.typing import NDArray
from PIL import Image
from ray.data import TaskPoolStrategy
from scipy import ndimage

from rlfseg import hdf5
from rlfseg.config import BenchConfig, EvaluateConfig, TrackingConfig, WorkersConfig
from rlfseg.hdf5 import Labelled, Sample
from rlfseg.metrics import THRESHOLDS, ClipSeg
from rlfseg.pipeline import evaluate
from rlfseg.pipeline.bench import Row
from rlfseg.pipeline.folders import begin, finish
from rlfseg.pipeline.rows import RowByRow
from rlfseg.pipeline.samples import LoadSample
from rlfseg.pipeline.stages import IndexDatasource, Step, connect

SIDE = 512
SHARDS = 4  # equal ones, so that one is a quarter of the set
LOADERS = 2
MEASURED = 24  # samples for the measures
ROUNDS = 3  # of which the quickest counts

ARRIVED = pa.schema([("id", pa.string()), ("status", pa.string()), ("bytes", pa.int64())])
T = TypeVar("T")
Counts = tuple[list[int], list[int]]  # tp and fp at each threshold
Figures = tuple[float, float, float]  # best mIoU, its threshold, AP
Pair = tuple[NDArray[np.float32], NDArray[np.uint8]]


def measure(config: BenchConfig) -> list[Row]:
    """All rows of the suite.

    Args:
        config: Settings of the command.

    Returns:
        Rows in the order in which they are shown.
    """
    rows = measures([scored(n) for n in range(MEASURED)])
    with tempfile.TemporaryDirectory(dir=config.out, prefix="data-") as made:
        folder = Path(made)
        whole, quarter = write_sets(folder, config.images)
        connect()
        return [*rows, reading(whole, folder), memory(folder, whole, quarter, config.images)]


# --- the measures ----------------------------------------------------------------------------------------------------


def scored(seed: int) -> Pair:
    """A made-up sample: a blob, and scores that are mostly right; float32 and uint8 {0, 1} [512, 512]."""
    rng = np.random.default_rng(seed)
    blob = ndimage.zoom(rng.random((9, 9)), SIDE / 9, order=1)
    truth = blob > np.quantile(blob, rng.uniform(0.5, 0.97))
    rough = ndimage.zoom(rng.normal(0.5, 0.35, (64, 64)), SIDE / 64, order=1) - 0.5
    return np.clip(truth * 0.8 + 0.1 + rough, 0, 1).astype(np.float32), truth.astype(np.uint8)


def measures(samples: list[Pair]) -> list[Row]:
    """Best mIoU and AP by histograms against loops over the 49 thresholds that come to the same numbers.

    Args:
        samples: Scores and true masks.

    Returns:
        A row against each loop.
    """
    wanted, ours = _timed(lambda: _figures(_by_histograms(samples)))
    rows = []
    for name, count, goal in (
        ("CLIPSeg's way (sort, then where)", _count_sorted, 20.0),
        ("masks and sums", _count_by_sums, 20.0),
        ("masks and count_nonzero, the tightest", _count_tightly, None),
    ):
        found, seconds = _timed(partial(_figures_by_loop, samples, count), rounds=1)
        if found != wanted:
            raise AssertionError(f"{name} came to {found}, ours to {wanted}")
        scale = 1000 / len(samples)
        rows.append(
            Row(
                name=f"best mIoU and AP of a sample, against {name}",
                ours=ours * scale,
                baseline=seconds * scale,
                ratio=seconds / ours,
                goal=goal,
                unit="ms",
            )
        )
    return rows


def _by_histograms(samples: list[Pair]) -> ClipSeg:
    sums = ClipSeg()
    for score, truth in samples:
        sums.merge(ClipSeg.of(score, truth))
    return sums


def _figures(sums: ClipSeg) -> Figures:
    got = sums.results()
    return got["miou_best"], got["miou_best_t"], got["ap_clipseg"]


def _figures_by_loop(samples: list[Pair], count: Callable[[NDArray[np.float32], NDArray[np.bool_]], Counts]) -> Figures:
    sums = ClipSeg()
    for score, truth in samples:
        tp, fp = (np.array(c, np.int64) for c in count(score, truth > 0))
        positives = int(truth.sum())
        iou = np.rint(tp / (1 + positives + fp) * 2**40).astype(np.int64)
        sums.merge(ClipSeg(n_samples=1, pixels=truth.size, positives=positives, tp=tp, fp=fp, iou=iou))
    return _figures(sums)


def _count_sorted(score: NDArray[np.float32], truth: NDArray[np.bool_]) -> Counts:
    """As CLIPSeg's FixedIntervalMetrics: sorted once, then the first score above each threshold is looked for."""
    import torch

    p, order = torch.from_numpy(score).flatten().sort()
    g = torch.from_numpy(truth).float().flatten()[order]
    tp, fp = [], []
    for t in THRESHOLDS:
        above = torch.where(p > t)[0]
        first = int(above[0]) if len(above) else len(g)
        tp.append(int(g[first:].sum()))
        fp.append(len(g) - first - tp[-1])
    return tp, fp


def _count_by_sums(score: NDArray[np.float32], truth: NDArray[np.bool_]) -> Counts:
    """As one writes it: true and false positives and false negatives by sums of masks."""
    tp, fp = [], []
    for t in THRESHOLDS.astype(np.float32):
        pred = score > t
        tp.append(int((pred & truth).sum()))
        fp.append(int((pred & ~truth).sum()))
        assert tp[-1] + int((~pred & truth).sum()) == truth.sum()
    return tp, fp


def _count_tightly(score: NDArray[np.float32], truth: NDArray[np.bool_]) -> Counts:
    tp, fp = [], []
    for t in THRESHOLDS.astype(np.float32):
        pred = score > t
        tp.append(np.count_nonzero(pred & truth))
        fp.append(np.count_nonzero(pred) - tp[-1])
    return tp, fp


def _timed(work: Callable[[], T], rounds: int = ROUNDS) -> tuple[T, float]:
    """What it gives, and the seconds of its quickest round."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        found = work()
        best = min(best, time.perf_counter() - start)
    return found, best


# --- files -----------------------------------------------------------------------------------------------------------


def write_sets(folder: Path, images: int) -> tuple[Path, Path]:
    """A finished set of samples with predictions beside it, and another of its first quarter.

    Args:
        folder: Where the folders `whole`, `quarter` and `scores` go.
        images: Samples of the whole.

    Returns:
        Folders of the whole and of the quarter.
    """
    whole, quarter, scores = folder / "whole", folder / "quarter", folder / "scores"
    scores.mkdir()
    states = [(path, {"bench": path.name}) for path in (whole, quarter)]
    for path, identity in states:
        begin(path, identity)
    shards = [whole / f"{n}.h5" for n in range(SHARDS)]
    lines: list[str] = []
    for n, shard in enumerate(shards):
        hdf5.write_shard(shard, _samples(range(n, images, SHARDS), scores, lines))
    for (path, identity), files in zip(states, (shards, shards[:1]), strict=True):
        index = hdf5.build_index(path, files)
        finish(path, identity, {"rows_in": index.num_rows, "rows_out": index.num_rows, "refused": {}})
    (scores / "predictions.csv").write_text("id,phrase,png\n" + "".join(lines))
    return whole, quarter


def _samples(numbers: range, scores: Path, lines: list[str]) -> Iterator[Sample]:
    """Pictures with a mask each, and their scores as PNGs."""
    for n in numbers:
        score, truth = scored(n % 50)
        Image.fromarray((score * 255).astype(np.uint8)).save(scores / f"{n}.png", compress_level=1)
        lines.append(f"{n},blob,{n}.png\n")
        image = np.random.default_rng(n).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        yield Sample(id=str(n), image=image, phrases=(Labelled(caption="blob", mask=truth),))


def reading(whole: Path, folder: Path) -> Row:
    """Samples a second through Ray Data against h5py in order; every pixel arrives in this process.

    Args:
        whole: Folder of samples.
        folder: Where the stage may write notes.

    Returns:
        The row.
    """
    index = hdf5.read_index(whole)
    (bytes_plain, plain), (bytes_ray, through_ray) = (
        _timed(partial(read, whole, index, folder)) for read in (_by_h5py, _by_ray)
    )
    if bytes_plain != bytes_ray:
        raise AssertionError(f"{bytes_plain} bytes by h5py, {bytes_ray} through Ray Data")
    n = index.num_rows
    return Row(
        name=f"HDF5 through Ray Data ({LOADERS} loaders), against h5py in order",
        ours=n / through_ray,
        baseline=n / plain,
        ratio=plain / through_ray,
        goal=0.9,
        unit="images/s",
    )


def _by_h5py(whole: Path, index: pa.Table, folder: Path) -> int:
    total = 0
    for shard in sorted(set(index["shard"].to_pylist())):
        with h5py.File(whole / shard, "r") as file:
            for sample in file.values():
                total += sample["image"][()].nbytes + sum(mask[()].nbytes for mask in sample["mask"].values())
    return total


def _by_ray(whole: Path, index: pa.Table, folder: Path) -> int:
    load = Step(RowByRow(LoadSample(whole)), stage="bench", notes=folder / "load", schema=None, stop=True)
    arrive = Step(RowByRow(_arrived), stage="bench", notes=folder / "arrive", schema=ARRIVED, stop=True)
    dataset = ray.data.read_datasource(IndexDatasource(index, 64)).map_batches(
        load, batch_size=8, batch_format="pyarrow", compute=TaskPoolStrategy(size=LOADERS), memory=2**29
    )
    batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    return sum(sum(arrive(batch)["bytes"].to_pylist()) for batch in batches)


def _arrived(row: dict[str, Any]) -> dict[str, Any]:
    return {"id": row["id"], "bytes": row["image"].nbytes + sum(mask.nbytes for mask in row["labels"])}


# --- memory ----------------------------------------------------------------------------------------------------------


class Peak(threading.Thread):
    """Watches the private memory of this process and of those under it, Ray's among them.

    Attributes:
        bytes: The most at a time, in bytes.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self._done = 0, threading.Event()

    def run(self) -> None:
        """Looks until the block ends."""
        while not self._done.wait(0.25):  # seconds
            self.bytes = max(self.bytes, sum(map(_private, _family())))

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._done.set()
        self.join()


def _family() -> list[psutil.Process]:
    here = psutil.Process()
    return [here, *here.children(recursive=True)]


def _private(process: psutil.Process) -> int:
    try:
        info = process.memory_info()
    except psutil.Error:  # it ended
        return 0
    return int(info.rss - getattr(info, "shared", 0))


def memory(folder: Path, whole: Path, quarter: Path, images: int) -> Row:
    """Most memory of an evaluation of all predictions, against that of a quarter of them: it must not grow.

    Args:
        folder: Holds `scores`; outputs go here.
        whole: Samples.
        quarter: A quarter of them.
        images: How many the whole has.

    Returns:
        The row.
    """
    peaks = {}
    for name, samples in (("warm-up", quarter), ("quarter", quarter), ("whole", whole)):
        settings = EvaluateConfig(
            samples=str(samples),
            predictions=str(folder / "scores"),
            out=str(folder / name),
            protocol=("rlfseg", "clipseg", "phrasecut", "refer"),
            overlays=0,
            run=WorkersConfig(workers=1, loaders=1),
            tracking=TrackingConfig(enabled=False),
        )
        with Peak() as peak:
            evaluate.run(settings)
        peaks[name] = peak.bytes / 2**30
    return Row(
        name=f"peak memory, evaluation of {images:,} saved 512 x 512 predictions, against a quarter of them",
        ours=peaks["whole"],
        baseline=peaks["quarter"],
        ratio=peaks["quarter"] / peaks["whole"],
        goal=0.8,
        unit="GiB",
    )
