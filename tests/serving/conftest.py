"""One real service for all tests of this folder: two models of which one fits in memory, a key, batches, low limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlfseg import adapter
from rlfseg.adapter import Card
from rlfseg.backbone import Backbone
from rlfseg.config import EVERY_LAYER, BackboneConfig, LoraConfig
from tests.serving.harness import Service, png, scene, started

KEY = "a-key-that-must-never-be-logged"


@pytest.fixture(scope="session")
def other_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of random weights on the shipped base, not calibrated: its answers differ from the shipped one's."""
    backbone = Backbone.load(BackboneConfig(base="tiny", resolution=64, device="cpu"))
    backbone.add_lora(LoraConfig(rank=4, alpha=8, targets=EVERY_LAYER))
    generator = torch.Generator().manual_seed(0)
    for weight in backbone.trainable():
        weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
    path = tmp_path_factory.mktemp("models") / "other"
    adapter.save(backbone, path, Card(base="tiny", resolution=64, threshold=0.4))
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with pictures that batches may read."""
    folder = tmp_path_factory.mktemp("pictures")
    for n in range(6):
        (folder / f"{n}.png").write_bytes(png(scene(n)))
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="session")
def service(
    tmp_path_factory: pytest.TempPathFactory, root: Path, other_adapter: Path, pictures: Path
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    keys = folder / "keys.txt"
    keys.write_text(f"# of the tests\n{KEY}\n")
    settings = {
        "models": {"tiny": "tiny", "other": str(other_adapter)},
        "device": "cpu",
        "resident": 1,
        "auth": True,
        "keys_file": str(keys),
        "limits": {"body_mb": 12, "phrases": 5, "images": 8, "queue": 16, "requests": 32},
        "batches": {"out": str(folder / "batches"), "roots": [str(pictures)]},
    }
    with started(folder, root, settings, key=KEY) as running:
        yield running
