"""Stages on real Ray with works that need no model: the faults of Ray Data that others met, and what must overlap."""

from __future__ import annotations

import ctypes
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ray import cloudpickle
from ray.data import DataContext

from rlfseg.config import PredictConfig, RefineConfig, SamConfig, WorkersConfig
from rlfseg.errors import BadSample, ConfigError, DataError, ResourceError
from rlfseg.pipeline import causes, cluster, predict, refine, stages
from rlfseg.pipeline.folders import begin, finish
from rlfseg.pipeline.rows import OK
from rlfseg.pipeline.stages import Stage, run_stage
from tests.pipeline.works import (
    Count,
    Deadly,
    Hopeless,
    PaintBackwards,
    PaintLast,
    Slow,
    Together,
    TooLarge,
    Unmade,
    as_it_is,
    deadly_count,
    paint,
    truth,
    weight_of_its_number,
)

pytestmark = [pytest.mark.usefixtures("ray"), pytest.mark.timeout(1800)]
SCHEMA = pa.schema([("id", pa.string()), ("status", pa.string()), ("value", pa.int64())])


def stage(out: Path, count: int, **changes: Any) -> Stage:
    rows = pa.table({"id": [str(n) for n in range(count)]})
    plain = Stage(
        name="count",
        rows=rows,
        load=paint,
        work=Count,
        schema=SCHEMA,
        out=out,
        run=WorkersConfig(batch_size=2),
        identity={"count": count},
        on_error="skip",
    )
    return replace(plain, **changes)


def values(out: Path) -> dict[str, int]:
    rows = [row for path in (out / "data").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    found = {row["id"]: row["value"] for row in rows}
    assert len(found) == len(rows)
    return found


# --- shapes and order ---------------------------------------------------------------------------------------------


@pytest.mark.fault("raydata-01")
@pytest.mark.parametrize("batch_size", [1, 2])
def test_pictures_of_different_sizes_and_a_last_batch_of_one(tmp_path: Path, batch_size: int) -> None:
    summary = run_stage(stage(tmp_path / "out", 5, run=WorkersConfig(batch_size=batch_size)))
    assert (summary.rows_in, summary.rows_out, summary.refused, summary.where) == (5, 5, {}, "1 worker, CPU")
    assert values(tmp_path / "out") == {str(n): truth(n) for n in range(5)}


@pytest.mark.fault("raydata-05")
def test_results_are_joined_by_id_whatever_the_order(tmp_path: Path) -> None:
    run = WorkersConfig(batch_size=2, loaders=3)
    run_stage(stage(tmp_path / "out", 6, run=run, load=PaintBackwards(tmp_path, 3)))
    assert values(tmp_path / "out") == {str(n): truth(n) for n in range(6)}


def test_who_is_in_a_batch_with_whom_depends_on_no_number_of_workers(tmp_path: Path) -> None:
    run = WorkersConfig(batch_size=3, workers=2, loaders=3)
    run_stage(stage(tmp_path / "out", 120, run=run, work=Together))
    assert values(tmp_path / "out") == {str(n): n - n % 3 for n in range(120)}


@given(st.integers(0, 5000), st.integers(1, 300), st.integers(1, 20), st.integers(1, 20))
def test_tasks_are_of_whole_batches_and_shrink_to_one(rows: int, batch_size: int, workers: int, loaders: int) -> None:
    index = pa.table({"id": [str(n) for n in range(rows)]})
    parts = stages.split(index, WorkersConfig(batch_size=batch_size, workers=workers, loaders=loaders), 256)
    assert [row["id"] for part in parts for row in part.to_pylist()] == index["id"].to_pylist()
    sizes = [part.num_rows for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size % batch_size == 0 for size in sizes[:-1])
    assert all(size <= max(256, batch_size) for size in sizes)
    # The last ones are done side by side: of these no worker waits for more than a batch of another
    assert all(size <= batch_size for size in sizes[-max(workers, loaders) :])


def test_fewer_batches_than_loaders_are_nothing_to_warn_of(tmp_path: Path) -> None:
    run_stage(stage(tmp_path / "out", 2, run=WorkersConfig(batch_size=2, loaders=3)))
    assert values(tmp_path / "out") == {"0": truth(0), "1": truth(1)}


# --- output folders -----------------------------------------------------------------------------------------------


@pytest.mark.fault("raydata-06")
def test_a_folder_with_files_of_an_earlier_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    thousand = stage(out, 1000, run=WorkersConfig(batch_size=100))
    # What a run that was killed while it wrote leaves behind: a file that no checkpoint vouches for
    (out / "data").mkdir(parents=True)
    stages.begin(tmp_path / "other", thousand.identity)
    (tmp_path / "other" / "_STARTED.json").rename(out / "_STARTED.json")
    half = pa.Table.from_pylist([{"id": str(n), "status": OK, "value": -1} for n in range(125)], schema=SCHEMA)
    pq.write_table(half, out / "data" / "old_000000-0.parquet")
    (out / "_checkpoint").mkdir()
    pq.write_table(half.select(["id"]), out / "_checkpoint" / "old_000000.pending.parquet")

    summary = run_stage(thousand)
    assert (summary.rows_out, summary.resumed) == (1000, 0)
    assert values(out) == {str(n): truth(n) for n in range(1000)}
    before = sorted(path.name for path in (out / "data").iterdir())
    assert run_stage(thousand).resumed == 1000
    assert sorted(path.name for path in (out / "data").iterdir()) == before
    with pytest.raises(DataError, match="other settings: count"):
        run_stage(replace(thousand, identity={"count": 999}))


def test_rows_of_another_job_are_not_counted_as_ours(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)
    table = pa.Table.from_pylist([{"id": "x", "status": OK, "value": 1}], schema=SCHEMA)
    pq.write_table(table, out / "data" / "a.parquet")
    with pytest.raises(DataError, match="x is none of this job's rows"):
        stages._account(stage(out, 0))


def test_a_node_that_does_not_see_the_output_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where each node has a folder of its own under that path: what it wrote there would be missing at the end."""
    monkeypatch.setattr(stages, "begin", lambda out, identity: out.mkdir() or "new")  # claimed, but not here
    with pytest.raises(ConfigError, match=f"out: {tmp_path / 'out'} is not seen by {os.uname().nodename}; all nodes"):
        run_stage(stage(tmp_path / "out", 3))
    assert not (tmp_path / "out").exists()


# --- samples that kill --------------------------------------------------------------------------------------------


@pytest.mark.fault("raydata-03")
def test_a_sample_that_kills_its_process_is_named_and_the_others_are_written(tmp_path: Path) -> None:
    """In a loader, in the only actor, and in the last step."""
    deadly = stage(
        tmp_path / "out",
        9,
        load=Deadly("1", paint),
        work=deadly_count,
        kwargs={"poison": "4"},
        finish=Deadly("8", as_it_is),
    )
    summary = run_stage(deadly)
    assert sorted(summary.refused) == ["1", "4", "8"]
    assert all("its process died 3 times" in reason for reason in summary.refused.values())
    done = values(tmp_path / "out")
    assert {k: v for k, v in done.items() if k not in summary.refused} == {str(n): truth(n) for n in (0, 2, 3, 5, 6, 7)}
    assert not (tmp_path / "out" / "_attempts").exists()


def test_a_bad_sample_stops_the_job_that_is_told_to_stop(tmp_path: Path) -> None:
    with pytest.raises(BadSample, match="never came"):
        run_stage(stage(tmp_path / "out", 3, load=Hopeless(), on_error="stop"))
    assert not (tmp_path / "out" / "_SUCCESS.json").exists()


# --- what runs at the same time -----------------------------------------------------------------------------------


def test_loading_work_finishing_and_writing_overlap(tmp_path: Path) -> None:
    """Were they done one after the other, the first picture would wait for the last and the last for the first."""
    summary = run_stage(stage(tmp_path / "out", 8, load=PaintLast(tmp_path / "out", 7), finish=as_it_is))
    assert summary.refused == {}


# --- devices ------------------------------------------------------------------------------------------------------


class Spy(cloudpickle.CloudPickler):
    """Finds tensors on their way to a worker."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), protocol=5)
        self.tensors: list[torch.Tensor] = []

    def persistent_id(self, thing: Any) -> None:
        if isinstance(thing, torch.Tensor):
            self.tensors.append(thing)


def sent(monkeypatch: pytest.MonkeyPatch, module: Any, config: Any) -> Stage:
    caught: list[Stage] = []
    monkeypatch.setattr(module, "run_stage", caught.append)
    module.run(config)
    return caught[0]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rlfseg.hdf5 import build_index, write_shard
    from rlfseg.hdf5.samples import Labelled, Sample

    out = tmp_path_factory.mktemp("samples")
    begin(out, {})
    phrase = Labelled(caption="a", mask=np.ones((8, 8), np.uint8))
    write_shard(out / "a.h5", [Sample(id="0", image=np.zeros((8, 8, 3), np.uint8), phrases=(phrase,))])
    build_index(out)
    finish(out, {}, {})
    return out


@pytest.mark.fault("raydata-10")
def test_models_are_made_in_the_actor_and_a_missing_gpu_is_told(
    tmp_path: Path, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy()
    spy.dump(torch.zeros(2))
    assert len(spy.tensors) == 1  # it would see one

    refining = sent(monkeypatch, refine, RefineConfig(samples=str(samples), out=str(tmp_path / "r")))
    predicting = sent(monkeypatch, predict, PredictConfig(images=str(samples), out=str(tmp_path / "p")))
    for caught in (refining, predicting):
        spy = Spy()
        spy.dump((caught.load, caught.work, caught.kwargs, caught.finish))
        assert spy.tensors == []
        assert caught.gpus == 0  # this Ray has none

    # A driver that sees a GPU, workers that don't
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = SamConfig(device="cuda")
    with pytest.raises(ResourceError, match="device: cuda is asked for, this Ray has 0 GPUs"):
        refine.run(RefineConfig(samples=str(samples), out=str(tmp_path / "r"), sam=gpu))
    with pytest.raises(ResourceError, match="device: cuda"):
        predict.run(PredictConfig(images=str(samples), out=str(tmp_path / "p"), device="cuda"))

    # A cluster with GPUs whose workers are told to take none
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 8, "GPU": 2})
    assert cluster.gpus_per_worker(WorkersConfig(), "auto") == 1
    assert cluster.gpus_per_worker(WorkersConfig(), "cpu") == 0
    assert cluster.gpus_per_worker(WorkersConfig(gpus=0.5), "cuda") == 0.5
    with pytest.raises(ResourceError, match=r"run\.gpus is 0\.0"):
        cluster.gpus_per_worker(WorkersConfig(gpus=0), "cuda")


@pytest.mark.parametrize(("given", "seen"), [([], ""), (["3"], "all of the node")])
def test_an_actor_to_which_ray_gave_no_gpu_makes_its_work_where_none_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], seen: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "all of the node")
    context = SimpleNamespace(get_accelerator_ids=lambda: {"GPU": given})
    monkeypatch.setattr(cluster.ray, "get_runtime_context", lambda: context)
    threads, there = torch.get_num_threads(), list[str]()
    step = {"stage": "x", "out": tmp_path, "name": "work", "schema": None, "stop": True}
    stages._Actor(lambda: there.append(os.environ["CUDA_VISIBLE_DEVICES"]), {}, 1, step)
    torch.set_num_threads(threads)
    assert there == [seen]


def test_a_full_gpu_is_told_in_a_line_and_the_stage_goes_on(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"a GPU's memory is full; lower fast\.max_batch .* or run\.batch_size"):
        run_stage(stage(tmp_path / "out", 3, work=TooLarge))
    assert run_stage(stage(tmp_path / "out", 3)).rows_out == 3
    for told, is_so in (
        ("CUDA error: out of memory", True),
        ("how to address the out of memory issue of a node", False),
    ):
        assert bool(causes.full_gpu(RuntimeError(told), tmp_path)) == is_so


def test_a_batch_is_cut_where_the_work_would_give_too_much(tmp_path: Path) -> None:
    eight = WorkersConfig(batch_size=8)
    heavy = stage(tmp_path / "out", 8, work=Together, run=eight, weigh=weight_of_its_number)
    assert run_stage(heavy).rows_out == 8
    # 0 to 2 weigh three quarters of a GiB together, 3 as much again; from 4 on each weighs one or more
    assert values(tmp_path / "out") == {"0": 0, "1": 0, "2": 0, "3": 3, "4": 4, "5": 5, "6": 6, "7": 7}


@pytest.mark.parametrize(("gpus", "most"), [(0, 64), (1, 16)])
def test_where_a_gpu_works_blocks_of_a_row_make_files_of_a_task(tmp_path: Path, gpus: int, most: int) -> None:
    small = stage(tmp_path / "out", 64, run=WorkersConfig(batch_size=1), row_group=3)
    begin(small.out, small.identity)
    rows = stages._pipeline(small)
    rows.context.target_max_block_size = 1
    stages._written(replace(small, gpus=gpus), rows)
    files = [pq.read_metadata(path) for path in (tmp_path / "out" / "data").glob("*.parquet")]
    assert sum(file.num_rows for file in files) == 64
    assert len(files) <= most
    if gpus:
        assert sorted(file.num_rows for file in files)[1] >= 4  # all but the last
    else:
        assert len(files) > 16
    assert all(file.row_group(n).num_rows <= 3 for file in files for n in range(file.num_row_groups))


def test_an_error_in_the_making_of_the_work_is_one_of_ours_and_claims_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^adapter: no such model$"):  # without Ray's advice on trying again
        run_stage(stage(tmp_path / "out", 1, work=Unmade))
    corrected = stage(tmp_path / "out", 1, identity={"model": "another"})
    assert run_stage(corrected).rows_out == 1


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (WorkersConfig(cpus=6), "count: run.cpus: 6 for each process, and no node has more than 4; lower it"),
        (WorkersConfig(gpus=1), "count: run.gpus: 1 for each process, and no node has more than 0.5; lower it"),
        (
            WorkersConfig(memory_gb=20),
            "count: run.memory_gb: 20 for each process, and no node has more than 16; lower it",
        ),
    ],
)
def test_a_process_that_no_node_has_the_room_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: WorkersConfig, told: str
) -> None:
    """Three nodes have it together; Ray would wait for ever."""
    node = {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 0.5, "memory": 16.0 * 2**30}}
    lost = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0, "memory": 2.0**40}}
    monkeypatch.setattr("ray.nodes", lambda: [node] * 3 + [lost])
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 12.0, "GPU": 1.5})
    with pytest.raises(ResourceError, match=f"^{told}$"):
        run_stage(stage(tmp_path / "out", 5, run=run, gpus=run.gpus or 0))


def test_a_task_may_take_as_long_as_it_likes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray ends what shows no progress for half an hour; a picture takes minutes on a CPU, a task has many."""
    monkeypatch.setattr(DataContext.get_current(), "execution_no_progress_timeout_s", 0.5)
    slow = stage(tmp_path / "out", 2, work=Slow)
    assert run_stage(slow).rows_out == 2


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="of glibc alone")
def test_freed_memory_is_kept_for_the_next_layer(root: Path) -> None:
    """By glibc's own account: what a system counts of faults and resident pages differs with its kernel.

    Parts are as large as need the setting, since what glibc maps apart it gives back on any kernel, and the rest
    only where it can shrink the heap.
    """
    script = """
import ctypes
import sys
import torch
from rlfseg.pipeline.stages import keep_freed_memory

NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
Mallinfo2 = type("Mallinfo2", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in NAMES]})
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2

if sys.argv[1] == "keep":
    keep_freed_memory()
[torch.ones(31 * 2**18) for part in range(4)]  # 124 MiB in parts of 31
print(mallinfo2().fordblks)
"""
    untuned = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES" and key[:7] != "MALLOC_"}
    kept = {}
    for how in ("keep", "leave"):
        done = subprocess.run(
            [sys.executable, "-c", script, how], cwd=root, env=untuned, capture_output=True, text=True, check=True
        )
        kept[how] = int(done.stdout)
    assert kept["leave"] < 31 * 2**20 < 124 * 2**20 <= kept["keep"]
