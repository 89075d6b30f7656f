"""A driver killed in the middle and started again: nothing is lost, nothing is done twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.drill, pytest.mark.timeout(1800)]
SCENES = 64


def command(name: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", f"jobs.{name}", *flags]


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder / "data").glob("*.parquet")}


def ids(folder: Path) -> list[str]:
    parts = (pq.read_table(p, columns=["id"])["id"].to_pylist() for p in (folder / "data").glob("*.parquet"))
    return sorted(i for part in parts for i in part)


def test_refine_killed_once_a_file_is_committed_goes_on_from_there(tmp_path: Path, root: Path) -> None:
    samples, out = tmp_path / "samples", tmp_path / "refined"
    flags = [f"--samples={samples}", f"--out={out}", "--run.batch_size=4", "--max_rounds=2"]
    drawn = [f"--out={samples}", f"--shapes.count={SCENES}", "--shapes.labels=coarse"]
    subprocess.run(command("prepare", *drawn), cwd=root, check=True)

    driver = subprocess.Popen(command("refine", *flags), cwd=root, start_new_session=True)
    while not files(out) and driver.poll() is None:
        time.sleep(0.05)  # until the first file is there; not a guess at how long that takes
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not (out / "_SUCCESS.json").exists()

    done = subprocess.run(command("refine", *flags), cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ids(out) == [f"train-{n:06d}" for n in range(SCENES)]
    assert "of them done before" in done.stdout

    # What an undisturbed run gives, label for label
    whole = tmp_path / "whole"
    subprocess.run(command("refine", f"--samples={samples}", f"--out={whole}", *flags[2:]), cwd=root, check=True)

    def labels(folder: Path) -> dict[str, list[str]]:
        tables = (pq.read_table(p).to_pylist() for p in (folder / "data").glob("*.parquet"))
        return {row["id"]: row["masks"] for rows in tables for row in rows}

    assert labels(out) == labels(whole)
