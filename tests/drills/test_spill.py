"""Two gigabytes of pictures through an object store with little room to spill."""

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
from rlfseg.pipeline.stages import Stage, run_stage
from tests.pipeline.works import Count, Megabyte
out, spill = Path(sys.argv[1]), sys.argv[2]
ray.init(num_cpus=8, object_store_memory=100_000_000, object_spilling_directory=spill, include_dashboard=False,
         log_to_driver=False, configure_logging=False)
rows = pa.table({"id": [str(n) for n in range(2000)]})
schema = pa.schema([("id", pa.string()), ("status", pa.string()), ("value", pa.int64())])
stage = Stage(name="tight", rows=rows, load=Megabyte(), work=Count, schema=schema, out=out, identity={},
              run=WorkersConfig(batch_size=8, loaders=3))
print(run_stage(stage).rows_out)
"""


@pytest.mark.fault("raydata-08")
def test_two_gigabytes_through_a_store_of_a_tenth(tmp_path: Path, root: Path) -> None:
    """Back-pressure holds the loaders: 2,000 pictures of 1 MB pass a store of 100 MB that can spill 200 MB."""
    spill, script = tmp_path / "spill", tmp_path / "tight.py"
    spill.mkdir()
    script.write_text(TIGHT)
    unshare = shutil.which("unshare")
    if not unshare:
        pytest.skip("no unshare(1): a file system of 200 MB can't be mounted for this process alone")
    inner = f"mount -t tmpfs -o size=200m tmpfs {spill} && exec {sys.executable} {script} {tmp_path / 'out'} {spill}"
    own = [unshare, "-m" if os.geteuid() == 0 else "-rm", "bash", "-c", inner]
    done = subprocess.run(own, cwd=root, capture_output=True, text=True, check=False, timeout=1500)
    if "mount" in done.stderr and "denied" in done.stderr:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2000" in done.stdout.splitlines(), done.stdout[-3000:]
