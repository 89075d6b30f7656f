"""Gigabytes of pictures through an object store with little room to spill."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.drill, pytest.mark.timeout(3600)]

TIGHT = """
import sys
from pathlib import Path
import pyarrow as pa, ray
from rlfseg.config import WorkersConfig
from rlfseg.errors import ResourceError
from rlfseg.pipeline.stages import Stage, run_stage
from tests.pipeline.works import Count, Megabyte
out, spill, store, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
ray.init(num_cpus=8, object_store_memory=store, object_spilling_directory=spill, include_dashboard=False,
         log_to_driver=False, configure_logging=False)
rows = pa.table({"id": [str(n) for n in range(count)]})
schema = pa.schema([("id", pa.string()), ("status", pa.string()), ("value", pa.int64())])
stage = Stage(name="tight", rows=rows, load=Megabyte(), work=Count, schema=schema, out=out, identity={},
              run=WorkersConfig(batch_size=8, loaders=3))
try:
    print(run_stage(stage).rows_out)
except ResourceError as error:
    print(error)
"""


def through(store: int, pictures: int, tmp_path: Path, root: Path) -> str:
    """What a job over pictures of 1 MB each prints, on a Ray with a store of so many bytes that may spill 200 MB."""
    spill, script = tmp_path / "spill", tmp_path / "tight.py"
    spill.mkdir()
    script.write_text(TIGHT)
    unshare = shutil.which("unshare")
    if not unshare:
        pytest.skip("no unshare(1): a file system of 200 MB can't be mounted for this process alone")
    line = f"{sys.executable} {script} {tmp_path / 'out'} {spill} {store} {pictures}"
    inner = f"mount -t tmpfs -o size=200m tmpfs {spill} && exec {line}"
    own = [unshare, "-m" if os.geteuid() == 0 else "-rm", "bash", "-c", inner]
    done = subprocess.run(own, cwd=root, capture_output=True, text=True, check=False, timeout=300)
    if "mount" in done.stderr and "denied" in done.stderr:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_four_gigabytes_through_a_store_of_a_tenth(tmp_path: Path, root: Path) -> None:
    """Back-pressure holds the loaders."""
    assert "4000" in through(400_000_000, 4000, tmp_path, root).splitlines()


@pytest.mark.fault("raydata-08")
def test_a_store_smaller_than_a_block_runs_or_is_told_at_once(tmp_path: Path, root: Path) -> None:
    """2 GB through 100 MB: a block alone, what a loader hands on at once, may have 128 MiB."""
    said = through(100_000_000, 2000, tmp_path, root)
    assert "2000" in said.splitlines() or "Ray's object store is full, and so is the disk that it spills to" in said
