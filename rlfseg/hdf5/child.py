"""Preflight: HDF5 files of others are read whole in a child process with limits, before anything else opens them.

libhdf5 is C: a hostile or damaged file can crash it, keep it busy for ever or make it ask for all memory, and no Python
in the same process can answer that. A child that dies can be named. It says what it is about to read, so the error has
the file and the sample, and its answers are JSON: a child that was taken over has no way to hand its parent an object.

One child reads all files; after a death a new one goes on behind the file that killed it. That costs a start and a
second reading, so it is for files that somebody names. Shards in a finished folder of `prepare` are not preflighted:
each was read back before it got its name, and stages read them in workers, whose death doesn't end the job.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rlfseg.errors import BadSample, ResourceError
from rlfseg.hdf5.reading import AnyPath, Reader, iter_ids, root_texts
from rlfseg.hdf5.samples import Sample, quoted

SECONDS = 60.0  # to list a file's samples, and to read each of them
MEMORY = 2 << 30  # bytes of address space beyond what Python itself takes; a sample has at most 1 GiB
TOLD = ("source", "rasteriser", "text")  # facts about a whole file, as `prepare` stores them
CHILD = "from rlfseg.hdf5.child import main; main()"


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was found in a sample, all of which could be read.

    Attributes:
        file: Path of its file.
        id: Its id.
        size: (H, W) in pixels.
        captions: In order.
        areas: Pixels in the mask of each caption.
        instances: Objects of each caption; None where the file doesn't tell.
        coco_id: Its id in COCO, where the file tells.
        attributes: Those of its file's that `TOLD` names.
    """

    file: str
    id: str
    size: tuple[int, int]
    captions: tuple[str, ...]
    areas: tuple[int, ...]
    instances: tuple[int | None, ...]
    coco_id: str | None
    attributes: Mapping[str, str] = field(default_factory=dict)


def preflight(
    files: Iterable[AnyPath], *, seconds: float = SECONDS, memory: int = MEMORY
) -> Iterator[Seen | BadSample]:
    """Reads every sample of every file in a child process.

    Args:
        files: HDF5 files.
        seconds: Time for one sample.
        memory: Bytes that the child may ask for.

    Yields:
        What was found in a sample, or what is wrong with it. An error without a sample ends its file: it can't be
        listed, or reading a sample (the error's text names it) crashed or hung.

    Raises:
        ResourceError: The child can't be started.
    """
    waiting = [os.fspath(f) for f in files]
    while waiting:
        yield from _fly(waiting, seconds, memory)


def _fly(files: list[str], seconds: float, memory: int) -> Iterator[Seen | BadSample]:
    """One child; it leaves in `files` those that it didn't come to."""
    with tempfile.TemporaryFile() as order, tempfile.TemporaryFile() as complaints:
        order.write(json.dumps({"files": files, "seconds": seconds, "memory": memory}).encode())
        order.seek(0)
        said: dict[str, Any] = {}
        with _started(order, complaints) as process:
            assert process.stdout
            for line in process.stdout:
                said = json.loads(line)
                if "seen" in said:
                    yield _seen(files[said["file"]], said["sample"], said["seen"])
                elif "bad" in said:
                    yield BadSample(said["bad"], file=files[said["file"]], sample=said["sample"])
            code = process.wait()
        if code == 0:
            files.clear()
            return
        complaints.seek(0)
        last = (complaints.read().decode(errors="replace").strip().splitlines() or ["nothing said"])[-1]
    if not said:
        raise ResourceError(f"the process that reads HDF5 files of others can't be started: {last}")
    what = "reading" if said["sample"] is None else f"reading its sample {quoted(said['sample'])}"
    yield BadSample(f"{what} {_cause(code, last, seconds)}", file=files[said["file"]])
    del files[: said["file"] + 1]


@contextmanager
def _started(order: IO[bytes], complaints: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    # -P: the folder that one stands in may be full of strangers' files, and is no place to import from.
    command = [sys.executable, "-P", "-c", CHILD]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdin=order, stdout=subprocess.PIPE, stderr=complaints, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def _cause(code: int, last: str, seconds: float) -> str:
    if code == -signal.SIGALRM:
        return f"took longer than {seconds:g} s: the file is damaged or made to keep a reader busy"
    if code < 0:
        return f"crashed ({signal.Signals(-code).name}): the file is damaged or made to do that"
    return f"failed ({last})"


def _seen(file: str, sample_id: str, facts: dict[str, Any]) -> Seen:
    height, width = facts["size"]
    return Seen(
        file=file,
        id=sample_id,
        size=(height, width),
        captions=tuple(facts["captions"]),
        areas=tuple(facts["areas"]),
        instances=tuple(facts["instances"]),
        coco_id=facts["coco_id"],
        attributes=facts["attributes"],
    )


# --- in the child ----------------------------------------------------------------------------------------------------


def main() -> None:
    """What the child runs: an order on stdin, a line of JSON on stdout for each thing begun and found."""
    order = json.load(sys.stdin)
    _limit_memory(order["memory"])
    for number, path in enumerate(order["files"]):
        for said in _read(Path(path), order["seconds"], order["memory"]):
            print(json.dumps({"file": number, **said}), flush=True)


def _read(path: Path, seconds: float, memory: int) -> Iterator[dict[str, Any]]:
    yield {"sample": None}
    try:
        with _time(seconds):
            ids, attributes = list(iter_ids(path)), root_texts(path, TOLD)
    except (BadSample, MemoryError) as error:
        yield {"sample": None, "bad": _reason(error, memory)}
        return
    reader, before = Reader(path.parent), set[str]()
    for sample_id in ids:
        yield {"sample": sample_id}
        try:
            with _time(seconds):
                sample = reader.verified(path.name, sample_id)
        except (BadSample, MemoryError) as error:
            yield {"sample": sample_id, "bad": _reason(error, memory)}
        else:
            twice = (
                {"bad": "this id is in the file twice"} if sample_id in before else {"seen": _facts(sample, attributes)}
            )
            yield {"sample": sample_id, **twice}
        before.add(sample_id)
    reader.close()


def _facts(sample: Sample, attributes: dict[str, str]) -> dict[str, Any]:
    return {
        "attributes": attributes,
        "size": sample.image.shape[:2],
        "captions": [p.caption for p in sample.phrases],
        "areas": [int(p.mask.sum()) for p in sample.phrases],
        "instances": [None if p.instances is None else len(p.instances) for p in sample.phrases],
        "coco_id": sample.coco_id,
    }


def _reason(error: BadSample | MemoryError, memory: int) -> str:
    return error.reason if isinstance(error, BadSample) else f"reading needs more memory than {memory >> 20:,} MiB"


@contextmanager
def _time(seconds: float) -> Iterator[None]:
    """SIGALRM ends the process where Python can't: inside of libhdf5."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_memory(memory: int) -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = resource.getrlimit(resource.RLIMIT_AS)[1]  # a container may allow less
    limit = taken + memory if most == resource.RLIM_INFINITY else min(taken + memory, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
