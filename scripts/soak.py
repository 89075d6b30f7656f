"""A soak: many small images through refine and predict, with the memory of every process watched.

    python scripts/soak.py --images 10000 --out runs/soak        # about an hour on two cores

Writes OUT/memory.csv, OUT/memory.png and a line a stage and group; exit code 1 if any grew by more than `--limit` from
the second to the last quarter of a stage: what is needed at all is there after the first.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from matplotlib.figure import Figure

from rlfseg.pipeline.stages import Committed

GROUPS = ("actors", "CPU tasks", "object store")
SAMPLES = "samples"


def commands(out: Path, images: int) -> dict[str, list[str]]:
    """What is run, by the name of its output folder."""
    samples, phrases = f"--samples={out / SAMPLES}", "--phrases=[red ring, blue star]"
    return {
        SAMPLES: ["prepare", f"--shapes.count={images}", "--shapes.labels=coarse"],
        "refined": ["refine", samples],
        "predicted": ["predict", f"--images={out / SAMPLES}", phrases],
    }


def memory(driver: psutil.Process) -> dict[str, float]:
    """MiB of the driver, of its Ray's processes by group, and of all shared memory, which is the object store's.

    The pages of the store count for no process that has not touched them itself, so not for its owner either.
    """
    found = dict.fromkeys(["driver", *GROUPS], 0.0) | {"object store": psutil.virtual_memory().shared / 2**20}
    for process in [driver, *driver.children(recursive=True)]:
        try:
            title, info = " ".join(process.cmdline()), process.memory_info()
        except psutil.Error:
            continue  # it just ended
        private = (info.rss - info.shared) / 2**20
        if process == driver:
            found["driver"] = private
        elif title.startswith("ray::"):
            found["actors" if "_Actor" in title else "CPU tasks"] += private
    return found


def watch(name: str, command: list[str], out: Path, every: float) -> list[dict[str, float]]:
    """Runs a command to its end and looks at it from time to time."""
    line = [sys.executable, "-m", f"jobs.{command[0]}", *command[1:], f"--out={out / name}"]
    count, rows = Committed(out / name), list[dict[str, float]]()
    start = time.monotonic()
    with subprocess.Popen(line) as process:
        driver = psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(every)
            if process.poll() is None:
                rows.append({"seconds": time.monotonic() - start, "rows": count(), **memory(driver)})
    if process.returncode:
        sys.exit(f"{name}: exit code {process.returncode}")
    return rows


def growth(rows: list[dict[str, float]], group: str) -> float:
    """The last quarter's median against the second's, between the first row on disk and the last; 0: flat."""
    first, last = rows[0]["rows"], rows[-1]["rows"]
    values = np.array([r[group] for r in rows if first < r["rows"] < last])
    quarters = np.array_split(values, 4)
    if min(map(len, quarters)) == 0:
        sys.exit(f"{len(values)} looks are too few to judge by: more --images, or a smaller --every")
    return float(np.median(quarters[3]) / max(1.0, np.median(quarters[1])) - 1)


def plot(stages: dict[str, list[dict[str, float]]], path: Path) -> None:
    """A panel a stage, a line a group."""
    figure = Figure(figsize=(5 * len(stages), 4), layout="constrained")
    for axes, (name, rows) in zip(np.atleast_1d(figure.subplots(1, len(stages))), stages.items(), strict=True):
        for group in ("driver", *GROUPS):
            axes.plot([r["rows"] for r in rows], [r[group] for r in rows], label=group)
        axes.set(title=name, xlabel="images on disk", ylabel="MiB", ylim=(0, None))
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs the three commands and judges."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("runs/soak"))
    p.add_argument("--images", type=int, default=10_000)
    p.add_argument("--every", type=float, default=2.0, help="seconds between two looks")
    p.add_argument("--limit", type=float, default=0.1, help="largest growth that counts as flat")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    stages = {name: watch(name, c, args.out, args.every) for name, c in commands(args.out, args.images).items()}
    del stages[SAMPLES]
    with (args.out / "memory.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["stage", *stages["refined"][0]])
        table.writerows([name, *(round(v, 1) for v in row.values())] for name, rows in stages.items() for row in rows)
    plot(stages, args.out / "memory.png")
    grown = {(name, group): growth(rows, group) for name, rows in stages.items() for group in ("driver", *GROUPS)}
    for (name, group), value in grown.items():
        print(f"{name}, {group}: {value:+.1%}")
    sys.exit(any(value > args.limit for value in grown.values()))


if __name__ == "__main__":
    main()
