"""Thousands of mutated inputs into everything that a user can hand in: each gives a result or a named error.

    python scripts/fuzz/run.py --inputs 100000 --seed 0 --out runs/fuzz.json
    python scripts/fuzz/run.py --kinds refer --only 217        # one input again, with the traceback; it is left in ./

An input is decided by seed, kind and number. It is read in a child process with limits of memory and time, so that a
crash, a hang or an exception that isn't ours is counted, with the input's number, and the run goes on behind it. HDF5
goes through `hdf5.preflight`, as files of others do: a crash in its own child is a named error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

SECONDS, MEMORY = 20, 3 << 30  # for one input; beyond what the libraries take
BATCH = 100  # HDF5 files in one preflight
LIBRARIES = ("h5py", "pillow", "pyarrow", "numpy", "safetensors", "peft")


# --- in the child ----------------------------------------------------------------------------------------------------


def child(seed: int, kinds: dict[str, list[int]]) -> None:
    """Reads inputs of each kind, from a number to another; says on stdout what it begins and how each ended."""
    warnings.simplefilter("ignore")
    from worlds import WORLDS

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for kind, (start, stop) in kinds.items():
        with tempfile.TemporaryDirectory() as made:
            os.chdir(made)
            world = WORLDS[kind]()
            _limit_memory()
            read = _preflighted if kind == "hdf5" else _one_by_one
            for ended in read(world, kind, seed, range(start, stop)):
                print(json.dumps({"kind": kind, **ended}), flush=True)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        peak = resource.getrusage(resource.RUSAGE_CHILDREN if kind == "hdf5" else resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"kind": kind, "peak_mib": peak >> 10}), flush=True)


def _limit_memory() -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))


def mutated(world: Any, kind: str, seed: int, number: int) -> tuple[str, bytes]:
    """Name and bytes of one input."""
    name, data = world.mutated(random.Random(f"{seed}/{kind}/{number}"))
    return name, data


def _one_by_one(world: Any, kind: str, seed: int, numbers: range) -> Iterator[dict[str, Any]]:
    folder = Path("world")
    world.place(folder)
    for number in numbers:
        name, data = mutated(world, kind, seed, number)
        yield {"begins": number}
        (folder / name).write_bytes(data)
        start = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        ended = outcome(world, folder)
        signal.setitimer(signal.ITIMER_REAL, 0)
        yield {"number": number, **ended, "seconds": time.perf_counter() - start}
        (folder / name).write_bytes(world.files[name])


def outcome(world: Any, folder: Path) -> dict[str, Any]:
    """How reading ended: `result`, the name of our error, or `foreign` with what it was."""
    from rlfseg.errors import RlfsegError

    try:
        world.read(folder)
    except RlfsegError as error:
        return {"outcome": type(error).__name__}
    except BaseException as error:  # noqa: BLE001  this is what is looked for
        frames = traceback.extract_tb(error.__traceback__)
        ours = next(
            (f for f in reversed(frames) if "rlfseg" in f.filename and "site-packages" not in f.filename), frames[-1]
        )
        where = f"{Path(ours.filename).name}:{ours.lineno}"
        return {"outcome": "foreign", "what": f"{where}: {type(error).__name__}: {error}"[:300]}
    return {"outcome": "result"}


def _preflighted(world: Any, kind: str, seed: int, numbers: range) -> Iterator[dict[str, Any]]:
    from rlfseg import hdf5
    from rlfseg.errors import BadSample

    for first in range(numbers.start, numbers.stop, BATCH):
        part = range(first, min(first + BATCH, numbers.stop))
        files = {f"{n}.h5": n for n in part}
        for file, number in files.items():
            Path(file).write_bytes(mutated(world, kind, seed, number)[1])
        yield {"begins": first}
        start = time.perf_counter()
        worst = dict.fromkeys(part, "result")
        for seen in hdf5.preflight(files, seconds=SECONDS / 4):
            if isinstance(seen, BadSample):
                of_child = seen.reason.startswith("reading ")
                ended = [w for w in ("crashed", "took longer", "failed") if of_child and f" {w} " in seen.reason]
                worst[files[seen.file]] = f"BadSample ({ended[0]})" if ended else "BadSample"
        each = (time.perf_counter() - start) / len(part)
        for number in part:
            yield {"number": number, "outcome": worst[number], "seconds": each}
            Path(f"{number}.h5").unlink()


# --- in the parent ---------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What became of the inputs of one kind; `peak_mib` is of the reader's process, which earlier kinds used too."""

    inputs: int
    done: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    peak_mib: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, kind: str, said: dict[str, Any]) -> None:
        """Counts one message of a child."""
        self.peak_mib = max(self.peak_mib, said.get("peak_mib", 0))
        if "number" in said:
            self.done = said["number"] + 1
            self.outcomes[said["outcome"]] += 1
            self.seconds += said["seconds"]
            self.slowest_s = max(self.slowest_s, round(said["seconds"], 3))
            if said["outcome"] == "foreign":
                self.failures.append(f"{kind} {said['number']}: {said['what']}")


def fuzz(seed: int, results: dict[str, Result]) -> None:
    """All inputs of all kinds; a child that dies is followed by another, behind the input that killed it."""
    while left := {kind: [r.done, r.inputs] for kind, r in results.items() if r.done < r.inputs}:
        begun = None
        with tempfile.TemporaryFile("w+") as complaints:
            command = [sys.executable, __file__, "--child", str(seed), json.dumps(left)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True) as process:
                assert process.stdout
                for said in map(json.loads, process.stdout):
                    begun = (said["kind"], said["begins"]) if "begins" in said else begun
                    results[said["kind"]].add(said["kind"], said)
            complaints.seek(0)
            last = (complaints.read().strip().splitlines() or [""])[-1]
        if process.returncode == 0:
            continue
        if begun is None:
            raise SystemExit(f"the child can't work: {last}")
        kind, number = begun
        what = "hang" if process.returncode == -signal.SIGALRM else f"crash ({process.returncode}) {last}"
        results[kind].outcomes[what.split()[0]] += 1
        results[kind].failures.append(f"{kind} {number}: {what}")
        results[kind].done = max(results[kind].done, number + 1)


def again(kind: str, seed: int, number: int) -> None:
    """One input, with its traceback; the input is left in the working folder."""
    from worlds import WORLDS

    world = WORLDS[kind]()
    name, data = mutated(world, kind, seed, number)
    left = Path(f"{kind}-{seed}-{number}-{Path(name).name}")
    left.write_bytes(data)
    print(f"{left}: {len(data)} bytes for {name}")
    with tempfile.TemporaryDirectory() as made:
        world.place(Path(made))
        (Path(made) / name).write_bytes(data)
        world.read(Path(made))


def main() -> int:
    """Returns 0 if there was no crash, hang or foreign exception."""
    from worlds import SHARES, WORLDS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(WORLDS), help="names with commas between")
    parser.add_argument("--only", type=int, help="number of one input of one kind, to see its traceback")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if options.only is not None:
        again(kinds[0], options.seed, options.only)
        return 0
    whole = sum(SHARES.get(kind, 1) for kind in kinds)
    results = {k: Result(max(1, round(options.inputs * SHARES.get(k, 1) / whole))) for k in kinds}
    start = time.perf_counter()
    fuzz(options.seed, results)
    report = {
        "seed": options.seed,
        "inputs": sum(r.outcomes.total() for r in results.values()),
        "failures": sum(len(r.failures) for r in results.values()),
        "slowest_s": max(r.slowest_s for r in results.values()),
        "peak_mib": max(r.peak_mib for r in results.values()),
        "seconds": round(time.perf_counter() - start, 1),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "kinds": {kind: vars(r) for kind, r in results.items()},
    }
    for kind, r in results.items():
        print(f"{kind:10} {r.inputs:6} {r.seconds:6.1f} s  {dict(sorted(r.outcomes.items()))}")
        print("".join(f"    {failure}\n" for failure in r.failures[:20]), end="")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1))
    print({k: v for k, v in report.items() if k not in ("kinds", "versions")})
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(int(sys.argv[2]), json.loads(sys.argv[3]))
        sys.exit(0)
    sys.exit(main())
