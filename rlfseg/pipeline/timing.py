"""How the bench measures time and memory: ways in turn, medians, peaks."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

Way = Callable[[], object]


def race(*ways: Way, rounds: int) -> list[float]:
    """Seconds of each way: the median of its rounds, in which the ways take turns, after one that doesn't count."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds + 1):
        for way, own in zip(ways, times, strict=True):
            own.append(seconds(way))
    return [statistics.median(own[1:]) for own in times]


def seconds(way: Way) -> float:
    """Seconds of one call, to the end of what it has the GPU do."""
    import torch

    start = time.perf_counter()
    way()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(way: Way) -> int:
    """Bytes that a call takes at its peak beyond what is taken before it; of the GPU where there is one."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    way()
    return high_water() - before


def high_water() -> int:
    """The most memory that this process has held, in bytes."""
    return _status("VmHWM")


def _status(field: str) -> int:
    """A line of Linux's own account of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
