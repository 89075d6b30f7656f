"""What `pip install` brings: the built wheel in an environment of its own, away from the checkout, without network."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

PROGRAM = """
import numpy as np, rlfseg
from rlfseg import Segmenter
image = np.full((48, 80, 3), 120, np.uint8)
image[10:30, 10:30] = (214, 48, 44)
(result,) = Segmenter.load("tiny")(image, ["red square"])
print(rlfseg.__file__, result.mask.shape, result.mask.dtype, sorted(set(np.unique(result.mask)) - {0, 1}))
"""


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(out.glob("*.whl"))


def test_it_ships_the_product_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"rlfseg", "jobs", "serve"}
    weights = {n for n in names if n.endswith(".safetensors")}
    assert "rlfseg/assets/adapter/adapter_model.safetensors" in weights
    assert "rlfseg/assets/sam/model.safetensors" in weights
    assert "rlfseg/assets/base/unet/diffusion_pytorch_model.safetensors" in weights
    assert wheel.stat().st_size < 40_000_000


def test_the_installed_package_segments_without_network(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    # The environment has the wheel; the libraries that it asks for are read from where they lie already (7 GB).
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"])
    zipfile.ZipFile(wheel).extractall(site)
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(python), "-c", PROGRAM], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(str(site))
    assert done.stdout.rstrip().endswith("(48, 80) uint8 []")
