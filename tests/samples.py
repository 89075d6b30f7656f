"""Samples for tests of HDF5."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlfseg.hdf5 import Labelled, Sample


def picture(height: int = 5, width: int = 7, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def mask_of(number: int, height: int = 5, width: int = 7) -> NDArray[np.uint8]:
    """A mask that holds a number in its bits."""
    bits = [number >> k & 1 for k in range(height * width)]
    return np.array(bits, np.uint8).reshape(height, width)


def sample(*captions: str, id: str = "100", **labelled: Any) -> Sample:
    phrases = tuple(Labelled(caption=c, mask=mask_of(n + 1), **labelled) for n, c in enumerate(captions))
    return Sample(id=id, image=picture(), phrases=phrases)


def assert_same(read: Sample, written: Sample) -> None:
    assert read.id == written.id
    assert read.image.dtype == np.uint8
    assert np.array_equal(read.image, written.image)
    assert [p.caption for p in read.phrases] == [p.caption for p in written.phrases]
    assert [p.task for p in read.phrases] == [p.task for p in written.phrases]
    for mine, theirs in zip(read.phrases, written.phrases, strict=True):
        assert mine.mask.dtype == np.uint8
        assert np.array_equal(mine.mask, theirs.mask)
        assert (mine.instances is None) == (theirs.instances is None)
        assert theirs.instances is None or np.array_equal(mine.instances, theirs.instances)


def run_limited(code: str, *arguments: object, memory: int = 6 << 30) -> str:
    """Runs code in a process of its own with little memory, and gives what it printed."""
    limited = f"import resource\nresource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))\n{textwrap.dedent(code)}"
    command = [sys.executable, "-W", "error", "-c", limited, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
