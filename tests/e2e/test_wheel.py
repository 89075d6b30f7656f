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

# A red ring and a blue one; whoever opens a socket on the way is stopped.
PROGRAM = """
import sys

def forbid_sockets(event, _):
    if event in ("socket.__new__", "socket.getaddrinfo"):
        raise AssertionError("a socket was opened")

sys.addaudithook(forbid_sockets)
import numpy as np, rlfseg
from rlfseg import Segmenter

def ring(x, y):
    distance = np.hypot(*(np.mgrid[:80, :120] + 0.5 - np.array([y, x])[:, None, None]))
    return (distance < 22) & (distance > 11)

image = np.full((80, 120, 3), 120, np.uint8)
image[ring(30, 40)], image[ring(88, 38)] = (214, 48, 44), (52, 92, 204)
(result,) = Segmenter.load("tiny")(image, ["red ring"])
mask, truth = result.mask.astype(bool), ring(30, 40)
print(rlfseg.__file__, mask.shape, (mask & truth).sum() / (mask | truth).sum())
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


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    venv.create(folder, with_pip=False)
    command = [sys.executable, "-m", "pip", "--python", str(folder), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    # The libraries that it asks for are read from where they lie already (7 GB).
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder / "bin" / "python"


def run(*command: str, cwd: Path) -> str:
    """What a command prints, away from the checkout."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_installed_package_finds_a_red_ring_without_network(installed: Path, tmp_path: Path) -> None:
    said = run(str(installed), "-c", PROGRAM, cwd=tmp_path).split()
    assert Path(said[0]).is_relative_to(installed.parents[1])
    assert said[1:3] == ["(80,", "120)"]
    assert float(said[3]) > 0.5


def test_the_installed_command_tells_its_commands(installed: Path, tmp_path: Path) -> None:
    said = run(str(installed.with_name("rlfseg")), cwd=tmp_path)
    assert all(f"\n  {name} " in said for name in ("prepare", "train", "predict", "serve"))
