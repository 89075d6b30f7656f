"""`rlfseg bench data`: the measures, reading HDF5 through Ray Data, and evaluation in bounded memory."""

from __future__ import annotations

import io
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import psutil
import pyarrow as pa
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
from rlfseg.pipeline.cluster import connect
from rlfseg.pipeline.folders import begin, finish
from rlfseg.pipeline.rows import RowByRow
from rlfseg.pipeline.samples import LoadSample
from rlfseg.pipeline.stages import Stage, Step, read_rows, split
from rlfseg.pipeline.timing import race

SIDE = 512
PHRASES = 4  # of a picture; PhraseCut has 4.5
SETS = {"all": 8, "half": 4, "eighth": 1}  # of samples, and how many of the shards
SHARDS = SETS["all"]
LOADERS = 3  # a loader waits for the store and for its next task: one more than the two cores it was chosen on
RUN = WorkersConfig(loaders=LOADERS, batch_size=8)
PASSES = 3  # over the files in one reading: Ray Data needs a second before more than one loader runs
MEASURED = 10  # samples for the measures
DIFFERENT = 50  # samples among those written, again and again; pictures all differ

ARRIVED = pa.schema([("id", pa.string()), ("status", pa.string()), ("bytes", pa.int64())])
Counts = tuple[list[int], list[int]]  # tp and fp at each threshold
Figures = tuple[float, float, float]  # best mIoU, its threshold, AP
Pair = tuple[NDArray[np.float32], NDArray[np.uint8]]


def measure(config: BenchConfig) -> Iterator[Row]:
    """All rows of the suite.

    Args:
        config: Settings of the command.

    Yields:
        Rows in the order in which they are shown.
    """
    yield from measures([scored(n) for n in range(MEASURED)], config.rounds)
    with tempfile.TemporaryDirectory(dir=config.out, prefix="data-") as made:
        folder = Path(made)
        write_sets(folder, config.images)
        connect()
        yield reading(folder, config.rounds)
        yield memory(folder)


# --- the measures ----------------------------------------------------------------------------------------------------


def scored(seed: int) -> Pair:
    """A made-up sample: a blob, and scores that are mostly right; float32 and uint8 {0, 1} [512, 512]."""
    rng = np.random.default_rng(seed)
    blob = ndimage.zoom(rng.random((9, 9)), SIDE / 9, order=1)
    truth = blob > np.quantile(blob, rng.uniform(0.5, 0.97))
    rough = ndimage.zoom(rng.normal(0.5, 0.35, (64, 64)), SIDE / 64, order=1) - 0.5
    return np.clip(truth * 0.8 + 0.1 + rough, 0, 1).astype(np.float32), truth.astype(np.uint8)


def measures(samples: list[Pair], rounds: int) -> list[Row]:
    """Best mIoU and AP by histograms against loops over the 49 thresholds that come to the same numbers.

    Args:
        samples: Scores and true masks.
        rounds: How often each is timed.

    Returns:
        A row against each loop.
    """
    ways = {
        "CLIPSeg's way (sort, then where)": (_count_sorted, 20.0),
        "masks and their sums": (_count_by_sums, 20.0),
        "the tightest we know (count_nonzero)": (_count_tightly, None),
    }
    wanted = _figures(_by_histograms(samples))
    loops = [partial(_by_loop, samples, count) for count, _ in ways.values()]
    for name, loop in zip(ways, loops, strict=True):
        if (found := _figures(loop())) != wanted:
            raise AssertionError(f"{name} came to {found}, ours to {wanted}")
    ours, *others = (
        1000 * t / len(samples) for t in race(lambda: _figures(_by_histograms(samples)), *loops, rounds=rounds)
    )
    return [
        Row(
            name=f"best mIoU and AP of a 512 x 512 sample, against a loop over thresholds: {name}",
            ours=ours,
            baseline=seconds,
            ratio=seconds / ours,
            goal=goal,
            unit="ms",
        )
        for (name, (_, goal)), seconds in zip(ways.items(), others, strict=True)
    ]


def _by_histograms(samples: list[Pair]) -> ClipSeg:
    sums = ClipSeg()
    for score, truth in samples:
        sums.merge(ClipSeg.of(score, truth))
    return sums


def _figures(sums: ClipSeg) -> Figures:
    got = sums.results()
    return got["miou_best"], got["miou_best_t"], got["ap_clipseg"]


def _by_loop(samples: list[Pair], count: Callable[[NDArray[np.float32], NDArray[np.bool_]], Counts]) -> ClipSeg:
    sums = ClipSeg()
    for score, truth in samples:
        tp, fp = (np.array(c, np.int64) for c in count(score, truth > 0))
        positives = int(truth.sum())
        iou = np.rint(tp / (1 + positives + fp) * 2**40).astype(np.int64)
        sums.merge(ClipSeg(n_samples=1, pixels=truth.size, positives=positives, tp=tp, fp=fp, iou=iou))
    return sums


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
    tp, fp, fn = [], [], []
    for t in THRESHOLDS.astype(np.float32):
        pred = score > t
        tp.append(int((pred & truth).sum()))
        fp.append(int((pred & ~truth).sum()))
        fn.append(int((~pred & truth).sum()))
    assert len({t + f for t, f in zip(tp, fn, strict=True)}) == 1
    return tp, fp


def _count_tightly(score: NDArray[np.float32], truth: NDArray[np.bool_]) -> Counts:
    tp, fp = [], []
    for t in THRESHOLDS.astype(np.float32):
        pred = score > t
        tp.append(int(np.count_nonzero(pred & truth)))
        fp.append(int(np.count_nonzero(pred)) - tp[-1])
    return tp, fp


# --- files -----------------------------------------------------------------------------------------------------------


def write_sets(folder: Path, images: int) -> None:
    """Finished sets of samples, one within the other, with predictions beside them.

    Args:
        folder: Where the folders of SETS and `scores` go.
        images: Samples of the largest.
    """
    (folder / "scores").mkdir()
    lines: list[str] = []
    shards = [folder / "all" / f"{n}.h5" for n in range(SHARDS)]
    for name, count in SETS.items():
        path, identity = folder / name, {"bench": name}
        begin(path, identity)
        if name == "all":
            for n, shard in enumerate(shards):
                hdf5.write_shard(shard, _samples(range(n, images, SHARDS), folder / "scores", lines))
        index = hdf5.build_index(path, shards[:count])
        finish(path, identity, {"rows_in": index.num_rows, "rows_out": index.num_rows, "refused": {}})
    (folder / "scores" / "predictions.csv").write_text("id,phrase,png\n" + "".join(lines))


def _samples(numbers: range, scores: Path, lines: list[str]) -> Iterator[Sample]:
    """Pictures with their masks, and scores of these as PNGs."""
    for n in numbers:
        phrases = []
        for k in range(PHRASES):
            truth, png = _stored((PHRASES * n + k) % DIFFERENT)
            (scores / f"{n}-{k}.png").write_bytes(png)
            lines.append(f"{n},blob {k},{n}-{k}.png\n")
            phrases.append(Labelled(caption=f"blob {k}", mask=truth))
        image = np.random.default_rng(n).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        yield Sample(id=str(n), image=image, phrases=tuple(phrases))


@cache
def _stored(n: int) -> tuple[NDArray[np.uint8], bytes]:
    """A true mask, and its scores as an 8-bit PNG."""
    score, truth = scored(n)
    file = io.BytesIO()
    Image.fromarray((score * 255).astype(np.uint8)).save(file, "PNG")
    return truth, file.getvalue()


def reading(folder: Path, rounds: int) -> Row:
    """Samples a second through Ray Data against h5py in order; every pixel arrives in this process.

    Args:
        folder: Holds the set `all`; the stage's notes go here.
        rounds: How often each is timed.

    Returns:
        The row.
    """
    index = pa.concat_tables([hdf5.read_index(folder / "all")] * PASSES)
    ways = [partial(read, folder, index) for read in (_by_ray, _by_h5py)]
    through_ray, plain = (way() for way in ways)
    if through_ray != plain:
        raise AssertionError(f"{through_ray} bytes through Ray Data, {plain} by h5py")
    ours, baseline = (index.num_rows / seconds for seconds in race(*ways, rounds=rounds))
    return Row(
        name=f"HDF5 through Ray Data ({LOADERS} loaders), against h5py in order",
        ours=ours,
        baseline=baseline,
        ratio=ours / baseline,
        goal=0.9,
        unit="images/s",
    )


def _by_h5py(folder: Path, index: pa.Table) -> int:
    total = 0
    for shard in sorted(set(index["shard"].to_pylist())) * PASSES:
        with h5py.File(folder / "all" / shard, "r") as file:
            for sample in file.values():
                total += sample["image"][()].nbytes + sum(mask[()].nbytes for mask in sample["mask"].values())
    return total


def _by_ray(folder: Path, index: pa.Table) -> int:
    common: dict[str, Any] = {"stage": "bench", "out": folder / "all", "stop": True}
    load = Step(RowByRow(LoadSample(folder / "all")), name="load", schema=None, **common)
    arrive = Step(RowByRow(_arrived), name="arrive", schema=ARRIVED, **common)
    dataset = read_rows(split(index, RUN, Stage.largest_task)).map_batches(
        load, batch_size=RUN.batch_size, batch_format="pyarrow", compute=TaskPoolStrategy(size=LOADERS), memory=2**29
    )
    batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    return sum(sum(done["bytes"].to_pylist()) for batch in batches for done in arrive(batch))


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


def memory(folder: Path) -> Row:
    """Most memory of an evaluation of saved predictions, against that of a quarter of them: it must not grow.

    Args:
        folder: Holds the sets `half` and `eighth`, and `scores`; outputs go here.

    Returns:
        The row.
    """
    peaks = {}
    for name in ("eighth", "half"):
        settings = EvaluateConfig(
            samples=str(folder / name),
            predictions=str(folder / "scores"),
            out=str(folder / f"evaluated-{name}"),
            protocol=("rlfseg", "clipseg", "phrasecut", "refer"),
            overlays=0,
            tracking=TrackingConfig(enabled=False),
        )
        with Peak() as peak:
            found = evaluate.run(settings)
        peaks[name] = peak.bytes / 2**30
    number = f"{found.figures['n_samples']:,} saved {SIDE} x {SIDE} predictions"
    return Row(
        name=f"peak memory, evaluation of {number}, against a quarter of them",
        ours=peaks["half"],
        baseline=peaks["eighth"],
        ratio=peaks["eighth"] / peaks["half"],
        goal=0.8,
        unit="GiB",
    )
