"""A root with pictures, a service's settings and a Ray that is played, for tests of batch jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlfseg.config import BatchesConfig, ServeConfig
from tests.serving.jobs import HAVE, FakeRay


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "shop").mkdir(parents=True)
    for name in ("a.png", "shop/b.png"):
        (folder / name).write_bytes(b"")
    (tmp_path / "secret.png").write_bytes(b"")
    return folder


@pytest.fixture
def config(tmp_path: Path, roots: Path) -> ServeConfig:
    return ServeConfig(
        device="cpu", gpus=0, batches=BatchesConfig(out=str(tmp_path / "out"), roots=(str(roots),), images=4)
    )


@pytest.fixture
def jobs() -> FakeRay:
    return FakeRay()


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlfseg.pipeline.cluster.ray.cluster_resources", lambda: HAVE)
