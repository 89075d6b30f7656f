"""What drills of training start from, made once."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.drills.training import STEPS, Training


@pytest.fixture(scope="session")
def latents(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    folder = tmp_path_factory.mktemp("data")
    drawn = [f"--out={folder / 'samples'}", "--shapes.count=26", "--images_per_shard=13"]
    subprocess.run([sys.executable, "-m", "jobs.prepare", *drawn], cwd=root, check=True)
    base = ["--backbone.base=tiny", "--backbone.resolution=64"]
    encoded = [f"--samples={folder / 'samples'}", f"--out={folder / 'latents'}"]
    subprocess.run([sys.executable, "-m", "jobs.encode", *base, *encoded], cwd=root, check=True)
    return folder / "latents"


@pytest.fixture(scope="session")
def undisturbed(latents: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    training = Training(root, latents, tmp_path_factory.mktemp("undisturbed") / "train")
    training.finish()
    assert training.logged()[0] == list(range(1, STEPS + 1))
    return training


@pytest.fixture
def clock(request: pytest.FixtureRequest) -> Iterator[None]:
    start = time.monotonic()
    yield
    print(f"\n| {request.node.name} | bit-equal | {time.monotonic() - start:.0f} s |")
