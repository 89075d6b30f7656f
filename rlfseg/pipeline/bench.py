"""Bench: what rlfseg's ways cost against the plain ones, as ratios in one run on one machine.

A suite is a module with a function `measure(config) -> list[Row]`: `bench_NAME` beside this one, or `serve/bench.py`.
"""

from __future__ import annotations

import importlib
import os
import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from rlfseg import __version__, tracking
from rlfseg.config import BenchConfig, as_dict
from rlfseg.pipeline.folders import write_json
from rlfseg.pipeline.stages import Summary

LIBRARIES = ("ray", "torch", "numpy", "scipy", "h5py", "pyarrow")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison.

    Attributes:
        name: What was measured, against what.
        ours: How much of `unit` rlfseg took.
        baseline: How much the plain way took, or what is hoped for; None: there is nothing to compare with.
        ratio: How many times better ours is; 1 is as good.
        goal: Least ratio to reach; None: none is set.
        unit: Of both.
    """

    name: str
    ours: float
    baseline: float | None
    ratio: float | None
    goal: float | None
    unit: str

    @property
    def verdict(self) -> str:
        """Whether the goal is reached."""
        if self.goal is None or self.ratio is None:
            return ""
        return "reached" if self.ratio >= self.goal else "missed"

    @property
    def figure(self) -> float:
        """What is kept of it: the ratio, or where there is none the amount."""
        return self.ours if self.ratio is None else self.ratio


def run(config: BenchConfig) -> Summary:
    """Runs a suite, prints one table, writes bench.json and records it.

    Args:
        config: Settings of the command.

    Returns:
        The ratios, by name.
    """
    start, out = time.monotonic(), Path(config.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    suite = "serve.bench" if config.what == "serve" else f"rlfseg.pipeline.bench_{config.what}"
    rows: list[Row] = importlib.import_module(suite).measure(config)
    here = machine()
    _show(config.what, rows, here)
    tree = {"what": config.what, "machine": here, "rows": [asdict(r) | {"verdict": r.verdict} for r in rows]}
    write_json(out / "bench.json", tree)
    with tracking.Run.start(
        config.tracking, params=as_dict(config), run_name=f"bench-{config.what}", tags={"rlfseg.stage": "bench"}
    ) as recorded:
        recorded.log_metrics({f"bench/{config.what}/{r.name}": r.figure for r in rows})
        recorded.log_artifact(out / "bench.json", "bench")
    return Summary(
        name="bench",
        out=str(out),
        rows_in=len(rows),
        rows_out=len(rows),
        refused={},
        seconds=time.monotonic() - start,
        figures={r.name: r.figure for r in rows},
    )


def machine() -> dict[str, str]:
    """What figures depend on: processor, memory, GPU, versions."""
    ours = [f"rlfseg {__version__}", f"Python {platform.python_version()}"]
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "gpu": _gpu(),
        "system": platform.platform(terse=True),
        "versions": ", ".join([*ours, *(f"{name} {version(name)}" for name in LIBRARIES)]),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _gpu() -> str:
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "none"


def _show(what: str, rows: list[Row], here: dict[str, str]) -> None:
    table = Table(title=f"rlfseg bench {what}", caption="\n".join(f"{k}: {v}" for k, v in here.items()))
    table.add_column("what")
    for column in ("rlfseg", "plain", "ratio", "goal", ""):
        table.add_column(column, justify="right")
    for r in rows:
        goal = "" if r.goal is None else f">= {r.goal:g}"
        baseline = "" if r.baseline is None else f"{r.baseline:.4g} {r.unit}"
        ratio = "" if r.ratio is None else f"{r.ratio:.2f}"
        table.add_row(r.name, f"{r.ours:.4g} {r.unit}", baseline, ratio, goal, r.verdict)
    Console().print(table)
