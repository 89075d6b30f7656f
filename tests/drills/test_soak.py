"""Memory stays flat over 10,000 images; the script says of what, and draws it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from rlfseg.config import RefineConfig
from rlfseg.datasets.shapes import draw_scene
from rlfseg.pipeline.refine import Refiner
from rlfseg.sam import SamModel


@pytest.mark.slow
@pytest.mark.drill
@pytest.mark.timeout(4 * 3600)
def test_memory_stays_flat(tmp_path: Path, root: Path) -> None:
    line = [sys.executable, str(root / "scripts" / "soak.py"), "--images=10000", f"--out={tmp_path}"]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "memory.png").stat().st_size > 10_000


def pictures(count: int) -> Iterator[dict[str, Any]]:
    """Rows for a Refiner: any size, 1 to 20 labels."""
    rng = np.random.default_rng(0)
    drawn = [Image.fromarray(p.coarse) for n in range(30) for p in draw_scene(n, split="test").phrases]
    for n in range(count):
        height, width, labels = *rng.integers(40, 400, 2), rng.integers(1, 21)
        chosen = rng.integers(0, len(drawn), labels)
        yield dict.fromkeys(("shard", "height", "width", "captions", "n_phrases", "bytes")) | {
            "id": str(n),
            "image": rng.integers(0, 256, (height, width, 3), np.uint8),
            "labels": [np.asarray(drawn[k].resize((width, height), Image.Resampling.NEAREST)) for k in chosen],
            "instances": [None] * int(labels),
        }


@pytest.mark.slow
@pytest.mark.fault("sam-08")
def test_a_loop_over_pictures_of_any_size_keeps_its_memory() -> None:
    """Of the GPU where there is one; and each picture is embedded once, whatever its number of labels."""
    config = RefineConfig(samples="none", out="none")
    sam = SamModel.load(config.sam)
    refiner, embedded, sizes = Refiner(config, sam), list[int](), list[int]()
    sam.sam.image_encoder.register_forward_pre_hook(lambda module, args: embedded.append(len(args[0])))
    for row in pictures(300):
        refiner([row])
        sizes.append(torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss)
    assert embedded == [1] * 300
    settled = np.array(sizes[20:])
    assert settled.max() <= 1.05 * settled.min(), [n >> 20 for n in sizes[::20]]
