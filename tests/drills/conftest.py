"""What drills of training start from, made once."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from rlfseg.pipeline.curve import read_curve
from tests.drills.training import STEPS, Training

PASSED = pytest.StashKey[bool]()


@pytest.fixture(scope="session")
def latents(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    folder = tmp_path_factory.mktemp("data")
    samples, refined, latents = folder / "samples", folder / "refined", folder / "latents"
    for stage, *flags in (  # refined, so that labels are chosen between
        ("prepare", "--shapes.count=26", "--images_per_shard=13", "--shapes.labels=coarse", f"--out={samples}"),
        ("refine", f"--samples={samples}", "--sam.checkpoint=tiny", "--max_rounds=1", f"--out={refined}"),
        ("encode", f"--samples={refined}", "--backbone.base=tiny", "--backbone.resolution=64", f"--out={latents}"),
    ):
        subprocess.run([sys.executable, "-m", f"jobs.{stage}", *flags], cwd=root, check=True)
    return latents


@pytest.fixture(scope="session")
def undisturbed(latents: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    training = Training(root, latents, tmp_path_factory.mktemp("undisturbed") / "train")
    training.finish()
    assert training.logged()[0] == list(range(1, STEPS + 1))
    assert {r["chose_refined"] for r in read_curve(training.out)} - {0.0, 1.0}  # both labels were chosen in a step
    return training


@pytest.fixture
def clock(request: pytest.FixtureRequest) -> Iterator[None]:
    start = time.monotonic()
    yield
    verdict = "passed" if request.node.stash.get(PASSED, False) else "FAILED"
    print(f"\n| {request.node.name} | {verdict} | {time.monotonic() - start:.0f} s |")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tells `clock` how its test came out."""
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report
