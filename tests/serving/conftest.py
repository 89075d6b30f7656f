"""One real service for all tests of this folder: two models of which one fits in memory, a key, batches, low limits."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, Page

from rlfseg import adapter
from rlfseg.adapter import Card
from rlfseg.backbone import Backbone
from rlfseg.config import EVERY_LAYER, BackboneConfig, LoraConfig
from serve.guard import Keys
from serve.model import Loaded
from tests.serving.browser import PAGE_KEY, ask_for, chromium, hand_over, models, opened, serving
from tests.serving.harness import Service, free_port, phrases_of, png, scene, started

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
        "metrics_port": free_port(),
        "auth": True,
        "keys_file": str(keys),
        "limits": {"body_mb": 12, "phrases": 5, "images": 8, "queue": 16, "requests": 32},
        "batches": {"out": str(folder / "batches"), "roots": [str(pictures)]},
    }
    with started(folder, root, settings, key=KEY) as running:
        yield running


# --- the page ------------------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is no browser, its tests are skipped by their names."""
    if shutil.which("chromium") is None:
        for item in items:
            if "browser" in getattr(item, "fixturenames", ()):
                reason = f"{item.name}: there is no `chromium`; apt-get install chromium"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")  # not longer: while playwright runs, asyncio.run refuses to work in this thread
def browser() -> Iterator[Browser]:
    with chromium(str(shutil.which("chromium"))) as running:
        yield running


@pytest.fixture(scope="session")
def page_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`calibrated` and `plain`: the shipped adapter with and without AOS and HSS."""
    return models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def page_loaded(page_models: dict[str, str]) -> dict[str, Loaded]:
    return {name: Loaded.load(reference, device="cpu") for name, reference in page_models.items()}


@pytest.fixture(scope="session")
def url(page_models: dict[str, str], page_loaded: dict[str, Loaded]) -> Iterator[str]:
    """The API in this process, for everybody."""
    with serving(page_models, page_loaded) as address:
        yield address


@pytest.fixture(scope="session")
def keyed(
    page_models: dict[str, str], page_loaded: dict[str, Loaded], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The same, for those who have the key."""
    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    path.write_text(PAGE_KEY)
    with serving(page_models, page_loaded, Keys(str(path))) as address:
        yield address


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    with opened(browser, url) as tab:
        yield tab


@pytest.fixture
def asked(page: Page) -> dict[str, Any]:
    """Scene 1 with two of its phrases, on the page; the service's answer."""
    hand_over(page, "drop", "one.png", png(scene(1)))
    return ask_for(page, *phrases_of(1)[:2])
