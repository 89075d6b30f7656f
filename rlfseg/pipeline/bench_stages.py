"""`rlfseg bench stages`: the steps of predict through Ray Data, against the same classes in a plain loop.

One torch thread on both sides, on the CPU. Of Ray the cost of a further image counts: the seconds of many images less
those of a few, since actors and their models are made once for a million images as for one. Many are as many as make
tasks as large as those of a million; of fewer, tasks are small, so that a kill costs little of the work.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from rlfseg import adapter
from rlfseg.config import BenchConfig, WorkersConfig
from rlfseg.datasets.shapes import draw_scene
from rlfseg.pipeline.bench import Row
from rlfseg.pipeline.cluster import connect
from rlfseg.pipeline.pictures import find
from rlfseg.pipeline.predict import SCHEMA, Finish, Load, Predictor
from rlfseg.pipeline.rows import RowByRow, Rows
from rlfseg.pipeline.stages import Stage, keep_freed_memory, run_stage
from rlfseg.pipeline.timing import seconds

PHRASES = ["red ring", "blue star"]
BATCH, FILE = 8, 256  # images a call, rows a file
WORKERS = {1: 0.9, 2: 1.7}  # actors, and the least ratio to reach with them


class OneThread:
    """The networks of predict on one torch thread, wherever they run."""

    def __init__(self, reference: str):
        self.predictor = Predictor(reference, device="cpu")

    def __call__(self, rows: Rows) -> Rows:
        """As `Predictor`."""
        torch.set_num_threads(1)
        return self.predictor(rows)


def measure(config: BenchConfig) -> list[Row]:
    """A row for each number of workers.

    Args:
        config: Settings of the command.

    Returns:
        Images a second, each further one.
    """
    few, many, plain = (64, 320, 256) if config.quick else (256, 8192, 2048)
    with tempfile.TemporaryDirectory(dir=config.out, prefix="stages-") as made:
        folder = Path(made)
        for name, count in (("few", few), ("many", many)):
            (folder / name).mkdir()
            for n in range(count):
                Image.fromarray(draw_scene(n, split="test", size=128).image).save(folder / name / f"{n:05d}.png")
        connect()
        times: dict[int, list[float]] = {workers: [] for workers in (0, *WORKERS)}
        loop = Loop(folder / "many", plain)
        for turn in range(config.rounds):
            times[0].append(seconds(loop))
            for workers in WORKERS:
                runs = [partial(through_ray, folder, name, workers, turn) for name in ("few", "many")]
                taken = [seconds(run) for run in runs]
                times[workers].append(taken[1] - taken[0])
    rate = {n: (many - few if n else plain) / statistics.median(own) for n, own in times.items()}
    return [
        Row(
            name=f"stages through Ray Data, {workers} workers, against the same classes in a loop",
            ours=rate[workers],
            baseline=rate[0],
            ratio=rate[workers] / rate[0],
            goal=goal,
            unit="images/s",
        )
        for workers, goal in WORKERS.items()
    ]


class Loop:
    """The plain way: load, predict, finish and write, batch by batch, in this process.

    Args:
        pictures: Folder of them.
        count: How many to take.
    """

    def __init__(self, pictures: Path, count: int):
        folder = adapter.resolve("tiny")
        card, found = adapter.read_card(folder), find(str(pictures), PHRASES, "")
        self.rows, self.out = found.rows.to_pylist()[:count], pictures.parent / "loop.parquet"
        self.load, self.finish = RowByRow(Load(found.read, card.resolution)), RowByRow(Finish(card.threshold))
        self.work = OneThread(str(folder))
        keep_freed_memory()  # as an actor does: what differs is Ray alone
        self.work(self.load(self.rows[:BATCH]))  # what is made at the first call doesn't count

    def __call__(self) -> None:
        """Works on all rows."""
        done: Rows = []
        for n in range(0, len(self.rows), BATCH):
            done += self.finish(self.work(self.load(self.rows[n : n + BATCH])))
            if len(done) >= FILE:
                pq.write_table(pa.Table.from_pylist(done, schema=SCHEMA), self.out)
                done = []


def through_ray(folder: Path, name: str, workers: int, turn: int) -> None:
    """The same as a stage.

    Args:
        folder: Holds the folders of pictures; the output goes there.
        name: Which of them.
        workers: Actors.
        turn: Number of the round, for the output's name.
    """
    reference = adapter.resolve("tiny").absolute()
    card, found = adapter.read_card(reference), find(str(folder / name), PHRASES, "")
    run_stage(
        Stage(
            name="bench",
            rows=found.rows,
            load=Load(found.read, card.resolution),
            work=OneThread,
            kwargs={"reference": str(reference)},
            finish=Finish(card.threshold),
            schema=SCHEMA,
            out=folder / f"out-{name}-{workers}-{turn}",
            run=WorkersConfig(workers=workers, batch_size=BATCH),
            identity={},
        )
    )
