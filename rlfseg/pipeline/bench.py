"""Bench: what rlfseg's ways cost against the plain ones, as ratios in one run on one machine.

A suite is a module with a function `measure(config)` that gives rows, each as soon as it is known: `bench_NAME` beside
this one, or `serve/bench.py`.
"""

from __future__ import annotations

import importlib
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from rlfseg import __version__, tracking
from rlfseg.config import BenchConfig, as_dict, without_passwords
from rlfseg.pipeline.folders import write_json
from rlfseg.pipeline.stages import Summary

SUITES = ("data", "model", "stages", "sd", "serve")
LIBRARIES = ("ray", "torch", "numpy", "scipy", "h5py", "pyarrow")
OPPONENTS = ("diffusers", "transformers", "peft", "accelerate", "segment-anything")


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
    """Runs suites, prints each row as it comes and one table, writes bench.json and machine.json and records them.

    Args:
        config: Settings of the command.

    Returns:
        The ratios, by name.
    """
    start, out = time.monotonic(), Path(config.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    config = replace(config, out=str(out))  # Ray moves a worker's working directory
    here, suites, rows = machine(), config.what or SUITES, list[Row]()
    write_json(out / "machine.json", here | {"settings": without_passwords(as_dict(config))})
    write_json(out / "bench.json", [])
    figures: dict[str, float] = {}
    with tracking.Run.start(
        config.tracking,
        params=as_dict(config),
        run_name=f"bench-{'-'.join(suites)}",
        tags={"rlfseg.stage": "bench"},
        system_metrics=False,  # which would be measured, too
    ) as recorded:
        try:
            for name, row in _measured(config, suites):
                rows.append(row)
                figures[f"bench/{name}/{row.name}"] = row.figure
                write_json(out / "bench.json", [asdict(r) | {"verdict": r.verdict} for r in rows])
                print(f"{row.name}: {row.ours:.4g} {row.unit}", flush=True)
        finally:  # where a suite fails after an hour of others
            recorded.log_metrics(figures)
            recorded.log_artifact(out / "bench.json", "bench")
            recorded.log_artifact(out / "machine.json", "bench")
            settings = f"rounds {config.rounds}, images {config.images}, quick {config.quick}"
            _show(suites, rows, here | {"settings": settings})
    return Summary(
        name="bench",
        out=str(out),
        rows_in=len(rows),
        rows_out=len(rows),
        refused={},
        seconds=time.monotonic() - start,
        figures={r.name: r.figure for r in rows},
    )


def _measured(config: BenchConfig, suites: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """The rows of each suite with its name, as they come."""
    for name in suites:
        suite = importlib.import_module("serve.bench" if name == "serve" else f"rlfseg.pipeline.bench_{name}")
        for row in suite.measure(config):
            yield name, row


def machine() -> dict[str, str]:
    """What figures depend on: processor, memory, GPU, versions."""
    ours = [f"rlfseg {__version__}", f"Python {platform.python_version()}"]
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "gpu": _gpu(),
        "system": platform.platform(terse=True),
        "versions": ", ".join([*ours, *(f"{name} {version(name)}" for name in LIBRARIES)]),
        "opponents": ", ".join(f"{name} {version(name)}" for name in OPPONENTS if find_spec(name.replace("-", "_"))),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _gpu() -> str:
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "none"


def _show(suites: Sequence[str], rows: list[Row], here: dict[str, str]) -> None:
    table = Table(title=f"rlfseg bench {' '.join(suites)}", caption="\n".join(f"{k}: {v}" for k, v in here.items()))
    table.add_column("what")
    for column in ("rlfseg", "plain", "ratio", "goal", ""):
        table.add_column(column, justify="right")
    for r in rows:
        goal = "" if r.goal is None else f">= {r.goal:g}"
        baseline = "" if r.baseline is None else f"{r.baseline:.4g} {r.unit}"
        ratio = "" if r.ratio is None else f"{r.ratio:.2f}"
        table.add_row(r.name, f"{r.ours:.4g} {r.unit}", baseline, ratio, goal, r.verdict)
    Console().print(table)
