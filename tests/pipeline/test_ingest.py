"""Who trains on what, when: `ingest.plan` against its own promises, and what Ray Data brings of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlfseg.backbone import Backbone
from rlfseg.config import ASSETS, BackboneConfig, TrainConfig
from rlfseg.hdf5 import id_hash
from rlfseg.pipeline import encode, ingest, sources
from rlfseg.pipeline.folders import weights, write_json
from rlfseg.pipeline.ingest import WINDOW, PhraseSource, batches, group_size, plan, steps_per_epoch
from rlfseg.pipeline.rows import OK, refused
from rlfseg.pipeline.sources import Latents, open_source

COUNTS = np.array([(n + n // 7) % 4 for n in range(77)])
EVERY = {(n, k) for n, count in enumerate(COUNTS) for k in range(count)}
Phrases = list[tuple[int, int]]


def ranks(world: int, lanes: int, batch: int, epoch: int = 0, start: int = 0) -> list[Phrases]:
    return [
        [
            (int(n), int(k))
            for n, k in plan(COUNTS, seed=42, epoch=epoch, lanes=lanes, batch=batch, rank=r, world=world, start=start)
        ]
        for r in range(world)
    ]


@pytest.mark.parametrize(("world", "batch"), [(1, 1), (1, 8), (2, 3), (3, 5), (8, 2)])
def test_every_phrase_once_but_for_a_short_tail(world: int, batch: int) -> None:
    seen = [phrase for own in ranks(world, world, batch) for phrase in own]
    assert len(seen) == len(set(seen))
    assert set(seen) <= EVERY
    assert len(EVERY) - len(seen) < world * batch


@pytest.mark.parametrize(("world", "batch"), [(2, 3), (3, 5), (4, 7)])
def test_equal_steps_on_every_rank_whatever_the_files(world: int, batch: int) -> None:
    assert {len(own) for own in ranks(world, world, batch)} == {len(EVERY) // (world * batch) * batch}


@given(lanes=st.integers(1, 9), world=st.integers(1, 9), batch=st.integers(1, 5), start=st.integers(0, 3))
def test_a_step_is_the_same_phrases_however_many_processes_are_left(
    lanes: int, world: int, batch: int, start: int
) -> None:
    world = min(world, lanes)
    alone = ranks(1, lanes, batch)[0]
    size = lanes * batch
    steps = [set(alone[n : n + size]) for n in range(start * size, len(alone), size)]
    shares = [len(range(r, lanes, world)) * batch for r in range(world)]
    for number, expected in enumerate(steps):
        parts = [
            own[number * share : (number + 1) * share]
            for own, share in zip(ranks(world, lanes, batch, start=start), shares, strict=True)
        ]
        together = [phrase for part in parts for phrase in part]
        assert len(together) == size
        assert set(together) == expected


def test_epochs_differ_and_the_same_epoch_does_not() -> None:
    assert ranks(2, 2, 4, epoch=0) == ranks(2, 2, 4, epoch=0)
    assert ranks(2, 2, 4, epoch=0) != ranks(2, 2, 4, epoch=1)


def test_resume_goes_on_at_the_very_step() -> None:
    whole, rest = ranks(2, 2, 4), ranks(2, 2, 4, start=3)
    assert rest == [own[3 * 4 :] for own in whole]


@pytest.mark.parametrize(("lanes", "group"), [(1, 256), (8, 256), (12, 168), (64, 32), (1000, 8)])
def test_phrases_are_shuffled_well_and_neighbours_come_from_few_groups(lanes: int, group: int) -> None:
    assert group == group_size(lanes)
    counts = np.full(40 * lanes * group, 3)
    order = plan(counts, seed=1, epoch=0, lanes=lanes, batch=1, rank=0, world=lanes)
    window = order[: WINDOW * group * 3, 0] // group
    assert len(set(window.tolist())) == WINDOW  # so a part of an epoch needs few files
    samples = order[: WINDOW * group * 3, 0].astype(float)
    assert abs(np.corrcoef(samples[:-1], samples[1:])[0, 1]) < 4 / len(samples) ** 0.5  # four deviations of chance
    if lanes == 1:
        assert sorted(map(tuple, order.tolist())) == [(n, k) for n in range(len(counts)) for k in range(3)]


# --- what Ray Data brings -----------------------------------------------------------------------------------------


def write_latents(folder: Path, files: Sequence[int], phrases: Sequence[int] = (1,)) -> Path:
    """A folder as `encode` leaves it, with files of so many samples, which have so many phrases in turn."""
    (folder / "data").mkdir(parents=True)
    ids = sorted((f"sample-{n}" for n in range(sum(files))), key=id_hash)
    rows = [
        {
            "id": name,
            "status": OK,
            "captions": [f"{name} has {k}" for k in range(phrases[n % len(phrases)])],
            "shape": [1, 1, 1],
            "z1": np.float16(n).tobytes(),
            "z0": [np.float16(k).tobytes() for k in range(phrases[n % len(phrases)])],
            "z0_refined": [np.float16(-k).tobytes() if k % 2 else None for k in range(phrases[n % len(phrases)])],
        }
        for n, name in enumerate(ids)
    ]
    for n, (end, size) in enumerate(zip(np.cumsum(files), files, strict=True)):
        part = [*rows[end - size : end], refused({"id": f"bad-{n}"}, "it is")]
        pq.write_table(pa.Table.from_pylist(part, schema=encode.SCHEMA), folder / "data" / f"{n:03}.parquet")
    base = {"base": "tiny", "resolution": 64, "weights": weights(ASSETS / "base" / "vae")}
    write_json(folder / "_SUCCESS.json", {"identity": {"backbone": base}})
    return folder


def settings(folder: Path, workers: int, batch: int, accumulate: int = 1) -> TrainConfig:
    tiny = BackboneConfig(base="tiny", resolution=64)
    return TrainConfig(
        out="", latents=str(folder), backbone=tiny, workers=workers, batch_size=batch, accumulate=accumulate
    )


def brought(config: TrainConfig, epoch: int, world: int, start: int = 0) -> list[list[list[str]]]:
    """Ids of each step of each process, by way of Ray Data."""
    source, none = open_source(config), Backbone.__new__(Backbone)  # latents need no network
    where = [{"epoch": epoch, "rank": rank, "world": world, "start": start} for rank in range(world)]
    return [[[i for b in step for i in b.ids] for step in batches(source, none, config, **w)] for w in where]


def joined(steps: list[list[list[str]]]) -> list[str]:
    return [i for own in steps for i in chain(*own)]


@pytest.mark.fault("dist-02")
@pytest.mark.usefixtures("ray")
def test_two_workers_see_a_hundred_samples_once_each(tmp_path: Path) -> None:
    config = settings(write_latents(tmp_path / "latents", [60, 40]), workers=2, batch=5)
    first, second = brought(config, epoch=0, world=2)
    assert Counter(joined([first, second])) == Counter(f"sample-{n}#0" for n in range(100))
    assert len(first) == len(second) == 10


@pytest.mark.fault("dist-06")
@pytest.mark.usefixtures("ray")
def test_blocks_of_thirty_and_ten_give_both_ranks_equal_steps_of_whole_batches(tmp_path: Path) -> None:
    config = settings(write_latents(tmp_path / "latents", [30, 10]), workers=2, batch=8)
    steps = brought(config, epoch=0, world=2)
    assert [[len(step) for step in own] for own in steps] == [[8, 8], [8, 8]]  # 40 = 2 x 2 x 8 + 8
    assert len(set(joined(steps))) == 32


@pytest.mark.usefixtures("ray")
def test_what_arrives_is_the_plan_in_every_epoch_and_after_a_resume(tmp_path: Path) -> None:
    """Three lanes; in the middle of the second epoch one of the processes is gone."""
    config = settings(write_latents(tmp_path / "latents", [9, 20, 4], phrases=[2, 0, 3]), workers=3, batch=2)
    source = open_source(config)
    names = sorted((f"sample-{n}" for n in range(33)), key=id_hash)
    whole = {epoch: brought(config, epoch, world=3) for epoch in (0, 1)}
    for epoch, steps in whole.items():
        for rank, own in enumerate(steps):
            shape = {"lanes": 3, "batch": 2, "rank": rank, "world": 3}
            order = plan(source.counts, seed=42, epoch=epoch, **shape)
            assert joined([own]) == [f"{names[n]}#{k}" for n, k in order.tolist()]
            assert len(own) == steps_per_epoch(source.counts, config) == 55 // 6
        seen = Counter(joined(steps))
        assert max(seen.values()) == 1
        assert seen.keys() <= {f"{names[n]}#{k}" for n in range(33) for k in range((2, 0, 3)[n % 3])}
        assert len(seen) == 54
    assert whole[0] != whole[1]
    rest = brought(config, epoch=1, world=2, start=4)
    of_step = [[set(chain(*step)) for step in zip(*steps, strict=True)] for steps in (rest, whole[1])]
    assert of_step[0] == of_step[1][4:]


@pytest.mark.usefixtures("ray")
def test_latents_arrive_as_they_were_written(tmp_path: Path) -> None:
    config = settings(write_latents(tmp_path / "latents", [5, 3], phrases=[3]), workers=1, batch=4)
    names = sorted((f"sample-{n}" for n in range(8)), key=id_hash)
    source, none = open_source(config), Backbone.__new__(Backbone)
    for batch in (b for step in batches(source, none, config, epoch=0, rank=0, world=1) for b in step):
        of = [(names.index(i.split("#")[0]), int(i.split("#")[1])) for i in batch.ids]
        assert list(batch.phrases) == [f"{names[n]} has {k}" for n, k in of]
        assert batch.has_refined.tolist() == [k % 2 == 1 for _, k in of]
        expected = {"z1": [n for n, _ in of], "z0": [k for _, k in of], "z0_refined": [k * (-1) ** k for _, k in of]}
        for name, values in expected.items():
            assert torch.equal(getattr(batch, name).flatten(), torch.tensor(values, dtype=torch.float32))


@pytest.mark.parametrize(("world", "lanes"), [(1, 1), (3, 3), (2, 4)])
def test_an_epoch_reads_each_file_once_but_at_the_ends_of_lanes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, lanes: int
) -> None:
    monkeypatch.setattr(ingest, "group_size", lambda lanes: 4)
    monkeypatch.setattr(ingest, "WINDOW", 3)
    source = open_source(settings(write_latents(tmp_path / "latents", [4] * 24, [2, 3]), workers=lanes, batch=2))
    assert isinstance(source, Latents)
    read, reads = sources._read_rows, list[list[str]]()

    def counted(path: str, *others: Any) -> Any:
        reads[-1].append(path)
        return read(path, *others)

    monkeypatch.setattr(sources, "_read_rows", counted)
    for rank in range(world):
        order = plan(source.counts, seed=1, epoch=0, lanes=lanes, batch=2, rank=rank, world=world)
        rows = list[str]()
        for task in PhraseSource(source, order, 4, 3 * lanes // world).get_read_tasks(1):
            reads.append([])
            rows += [i for table in task() for i in table["id"].to_pylist()]
        names = sorted((f"sample-{n}" for n in range(96)), key=id_hash)
        assert rows == [f"{names[n]}#{k}" for n, k in order.tolist()]
    assert all(len(files) == len(set(files)) <= 3 * lanes // world for files in reads)  # held by a task
    of_epoch = sum(map(len, reads))
    assert 24 <= of_epoch <= (24 + 3 * (lanes - 1)) * lanes // world


@given(size=st.integers(1, 30), group=st.integers(1, 9), data=st.data())
def test_of_a_file_no_more_is_read_than_the_row_groups_that_are_needed(
    tmp_path_factory: pytest.TempPathFactory, size: int, group: int, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("file") / "a.parquet"
    pq.write_table(pa.table({"n": range(size), "of": [[n] * 2 for n in range(size)]}), path, row_group_size=group)
    rows = data.draw(st.sets(st.integers(0, size - 1), min_size=1))
    table, at = sources._read_rows(str(path), rows, ["n", "of"])
    assert {n: (table["n"][at[n]].as_py(), table["of"][at[n]].as_py()) for n in rows} == {n: (n, [n, n]) for n in rows}
    assert set(table["n"].to_pylist()) == {n for n in range(size) if {n // group} & {row // group for row in rows}}


def test_latents_read_in_an_epoch_of_phrasecut() -> None:
    """The figures of docs/scaling.md: row groups, which are of encode's whole batches whatever the files."""
    images, phrases = 71_746, 310_816
    counts = 1 + np.random.default_rng(0).multinomial(phrases - images, np.ones(images) / images)
    groups = -(-images // encode.ROW_GROUP)
    for workers, most, before_the_first_step in ((1, 1.0, 0.03), (8, 1.25, 0.25), (48, 1.25, 0.25), (64, 1.25, 0.25)):
        orders = [
            plan(counts, seed=42, epoch=0, lanes=workers, batch=8, rank=r, world=workers)[:, 0] for r in range(workers)
        ]
        parts = [
            [len(np.unique(part // encode.ROW_GROUP)) for part in np.split(order, cuts)]
            for order in orders
            for cuts in [ingest._cuts(order // group_size(workers), WINDOW)]
        ]
        read, first = sum(map(sum, parts)), sum(windows[0] for windows in parts)
        print(f"{workers} workers: {read} row groups read, {read / groups:.2f} times all {groups};", end=" ")
        print(f"{first} before the first step, {first / groups:.2f}")
        assert read <= most * groups
        assert first <= before_the_first_step * groups
