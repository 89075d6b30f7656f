"""Training ingest: who sees which phrase in which step is a pure function of (seed, epoch); Ray Data carries it.

The samples, in groups of neighbours, are shuffled by seed, then the phrases inside every few groups; the sequence is
cut into as many lanes as the config has workers, and a step takes the next few phrases of every lane. A process plays
one lane, or several where fewer processes than workers are left. So a step is the same phrases however many processes
there are; all ranks have equal steps whatever the files; every phrase is seen once an epoch, but for a tail shorter
than a step, which is counted; and a resumed run starts at the very step without reading what came before. Each process
reads its own part: no barrier and no coordinator between ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from rlfseg.backbone import Backbone
from rlfseg.config import TrainConfig
from rlfseg.pipeline.encode import ROW_GROUP
from rlfseg.pipeline.sources import Phrase, Source
from rlfseg.training import Batch

WINDOW = 8  # groups whose phrases are shuffled together
TASK_BYTES = 128 * 2**20  # most that a task brings that reads sample by sample


def group_size(lanes: int) -> int:
    """Samples that stay together, since `encode` writes neighbours near each other.

    From 8 lanes on, all windows of a step hold as many samples between them: of fewer workers' windows a lane of many
    would have less than one, and read nearly all of it before its first step.
    """
    return max(ROW_GROUP, 256 * 8 // max(lanes, 8) // ROW_GROUP * ROW_GROUP)


def steps_per_epoch(counts: NDArray[np.int64], config: TrainConfig) -> int:
    """Whole steps in one pass over the data."""
    return int(counts.sum()) // (config.workers * config.batch_size * config.accumulate)


def plan(
    counts: NDArray[np.int64], *, seed: int, epoch: int, lanes: int, batch: int, rank: int, world: int, start: int = 0
) -> NDArray[np.int64]:
    """The phrases of one process in one epoch from step `start` on, in order.

    Args:
        counts: Phrases of each sample, int [n].
        seed: Of the training.
        epoch: Number of the epoch.
        lanes: Workers that the config asks for.
        batch: Phrases of a lane in a step.
        rank: Of the process.
        world: Processes, at most as many as lanes.
        start: Steps of the epoch that are done.

    Returns:
        (sample, phrase) a row, int64 [m, 2]: step by step, in a step lane by lane.
    """
    sequence = _sequence(counts, np.random.default_rng([seed, epoch]), group_size(lanes))
    steps = len(sequence) // (lanes * batch)
    lane = sequence[: lanes * steps * batch].reshape(lanes, steps, batch, 2)
    return lane[rank::world, start:].swapaxes(0, 1).reshape(-1, 2)


def _sequence(counts: NDArray[np.int64], rng: np.random.Generator, group: int) -> NDArray[np.int64]:
    """All phrases of an epoch, shuffled so that neighbours come from few groups."""
    samples = np.arange(len(counts))
    groups = [samples[n : n + group] for n in range(0, len(samples), group)]
    order = rng.permutation(len(groups))
    parts = []
    for n in range(0, len(order), WINDOW):
        chosen = np.concatenate([groups[g] for g in order[n : n + WINDOW]])
        window = np.repeat(chosen, counts[chosen])
        first = np.cumsum(counts[chosen]) - counts[chosen]
        phrase = np.arange(len(window)) - np.repeat(first, counts[chosen])
        parts.append(rng.permutation(np.stack([window, phrase], axis=1)))
    return np.concatenate(parts)


def batches(
    source: Source, backbone: Backbone, config: TrainConfig, *, epoch: int, rank: int, world: int, start: int = 0
) -> Iterator[list[Batch]]:
    """What one process computes in each step of one epoch from step `start` on, read ahead by Ray Data.

    Args:
        source: What is trained on.
        backbone: Encodes where the source holds pixels.
        config: Seed, workers, batch_size and accumulate.
        epoch: Number of the epoch.
        rank: Of the process.
        world: Processes.
        start: Steps of the epoch that are done.

    Yields:
        For each step the batches of this process, of batch_size phrases each.
    """
    lanes, batch = config.workers, config.batch_size * config.accumulate
    shape = {"lanes": lanes, "batch": batch, "rank": rank, "world": world}
    order = plan(source.counts, seed=config.seed, epoch=epoch, start=start, **shape)
    if not len(order):
        return
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # a validation between two steps may take as long as it likes
    own_lanes = len(range(rank, lanes, world))
    # A task that reads row groups holds them while its phrases are used up, so there is one at a time; it reserves no
    # CPU, for which the tasks of two ranks could wait for ever. So would any beside workers of whom Ray starts as many
    # as it has CPUs for.
    pace: Any = {"concurrency": 1, "num_cpus": 0} if source.by_file or config.min_workers else {}
    ds = ray.data.read_datasource(PhraseSource(source, order, group_size(lanes), own_lanes * WINDOW), **pace)
    tables = ds.iter_batches(batch_size=config.batch_size, batch_format="pyarrow", prefetch_batches=2)
    ready = (source.batch(table, backbone) for table in tables)
    a_step = own_lanes * config.accumulate
    while step := list(islice(ready, a_step)):
        yield step


class PhraseSource(Datasource):
    """Planned phrases as a Ray Data source, a row a phrase, in the order of the plan.

    Args:
        source: Reads them.
        order: (sample, phrase) a row, int64 [m, 2].
        group: Samples of a group.
        groups: Most groups of which a task holds the row groups at once, where the source reads those.
    """

    def __init__(self, source: Source, order: NDArray[np.int64], group: int, groups: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.source, self.order, self.group, self.groups = source, order, group, groups

    def estimate_inmemory_data_size(self) -> int | None:
        """Of all planned rows, in bytes."""
        return len(self.order) * self.source.phrase_bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """A task a window, which reads each of its row groups once; or one every TASK_BYTES, sample by sample."""
        if self.source.by_file:
            cuts = _cuts(self.order[:, 0] // self.group, self.groups)
        else:
            size = max(1, TASK_BYTES // self.source.phrase_bytes)
            cuts = list(range(size, len(self.order), size))
        return [self._task(part.tolist(), per_task_row_limit) for part in np.split(self.order, cuts)]

    def _task(self, part: Sequence[Phrase], limit: int | None) -> ReadTask:
        size = len(part) * self.source.phrase_bytes
        about = BlockMetadata(num_rows=len(part), size_bytes=size, input_files=None, exec_stats=None)
        return ReadTask(self.source.reader(part), about, per_task_row_limit=limit)


def _cuts(groups: NDArray[np.int64], most: int) -> list[int]:
    """Where to cut a sequence of groups, so that each part has at most so many different ones."""
    cuts: list[int] = []
    seen: set[int] = set()
    for n, group in enumerate(groups.tolist()):
        if len(seen | {group}) > most:
            cuts.append(n)
            seen.clear()
        seen.add(group)
    return cuts
