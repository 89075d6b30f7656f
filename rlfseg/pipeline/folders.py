"""Output folders that are whole or unfinished, never in doubt.

`_STARTED.json` is written before the first row, `_SUCCESS.json` after the last; `_lock` is held while a job runs.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import file_digest, sha256
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from rlfseg.config import digest
from rlfseg.errors import ConfigError, DataError, ModelError
from rlfseg.pipeline.rows import OK, Row

STARTED = "_STARTED.json"
# What diffusers, transformers and peft load; not another tool's variant beside it, model.fp16.safetensors for example
WEIGHTS = re.compile(r"(diffusion_pytorch_|adapter_)?model(-\d+-of-\d+)?\.safetensors")

logger = logging.getLogger(__name__)


def begin(out: Path, identity: Row) -> str:
    """Claims a folder for a job: `new`, `resume` (unfinished, same identity) or `done`.

    Args:
        out: The folder; made where it is missing.
        identity: Whatever changes the result.

    Returns:
        `new`, `resume` or `done`.

    Raises:
        DataError: The folder belongs to a job with other settings or inputs; names the fields.
    """
    started = out / STARTED
    if started.exists():
        known = identity_of(read_json(started), out)
        now = json.loads(json.dumps(identity))
        if known != now:
            fields = [
                f"{k} ({known.get(k)!r} then, {now.get(k)!r} now)"
                for k in sorted({*known, *now})
                if known.get(k) != now.get(k)
            ]
            raise DataError(
                f"{out} was begun with other settings: {'; '.join(fields)}; give the same to go on, or another `out`"
            )
        return "done" if (out / "_SUCCESS.json").exists() else "resume"
    # A start that could not write it, or was killed at that, has written nothing else
    if out.exists() and any(path.name != f".{STARTED}.tmp" for path in out.iterdir()):
        raise DataError(f"{out} is not empty and was not written by this command; give another `out`")
    out.mkdir(parents=True, exist_ok=True)
    write_json(started, {"schema": 1, "id": uuid4().hex[:12], "hash": digest(identity), "identity": identity})
    return "new"


def unseen(out: Path) -> ConfigError | None:
    """The error of a node that doesn't see a folder which a job has claimed on another; None where it does."""
    return None if (out / STARTED).is_file() else not_shared("out", str(out))


def not_shared(setting: str, place: str) -> ConfigError:
    """What to say of a folder that this node doesn't see."""
    node = os.uname().nodename
    return ConfigError(f"{setting}: {place} is not seen by {node}; all nodes must share it, under the same path")


@contextmanager
def alone(out: Path, name: str = "_lock", wait: float = 0) -> Iterator[None]:
    """Keeps a second start of the same job out of a claimed folder; the lock ends with this process, however it ends.

    Args:
        out: A folder that `begin` has claimed.
        name: File of the lock.
        wait: For another process to end, in seconds.

    Yields:
        Nothing, while no other process works in the folder.

    Raises:
        DataError: Another process does.
    """
    lock = FileLock(out / name, timeout=wait, fallback_to_soft=False)  # a soft one would outlive a process killed
    with ExitStack() as held:
        try:
            held.enter_context(lock)
        except Timeout:
            raise DataError(f"{out}: this job runs already; wait for it, or stop it") from None
        except OSError as error:  # NFS without its lock daemon, a mounted bucket
            logger.warning("%s can't be locked (%s); start nothing else that writes there", out, error)
        yield


def unclaim(out: Path, error: BaseException | None, begun: Callable[[], object]) -> None:
    """Removes the folder of a job that failed by its settings before it had anything to keep: they claim no folder.

    Args:
        out: A folder that `begin` has claimed.
        error: Why the job failed.
        begun: Tells whether there is anything to keep.
    """
    if isinstance(error, ConfigError | ModelError) and not begun():
        remove(out)


def remove(out: Path) -> None:
    """Removes a claimed folder with nothing to keep; on NFS our own lock keeps it, empty, which is as good."""
    shutil.rmtree(out, ignore_errors=True)


def finish(out: Path, identity: Row, counts: Row) -> None:
    """Marks a folder as whole; the last thing that a job does."""
    write_json(out / "_SUCCESS.json", {"schema": 1, "hash": digest(identity), "identity": identity, **counts})


def require_finished(folder: Path) -> Row:
    """What `_SUCCESS.json` says of a finished folder.

    Args:
        folder: Output folder of a stage.

    Returns:
        Counts and identity of the job that wrote it.

    Raises:
        DataError: There is none: the job that writes it has not finished.
    """
    path = folder / "_SUCCESS.json"
    if not path.is_file():
        if (folder / STARTED).exists():
            raise DataError(f"{folder} is unfinished: start the same command again (no _SUCCESS.json)")
        files = next(folder.glob("*.h5"), None)
        fix = f"; `rlfseg prepare --source hdf5 --path {folder} --out ...` takes files of others in" if files else ""
        raise DataError(f"{folder} is not an rlfseg folder (no _SUCCESS.json){fix}")
    return read_json(path)


def fingerprint(folder: Path) -> str:
    """Short hash of what a finished folder was made from, and how."""
    return sha256((folder / "_SUCCESS.json").read_bytes()).hexdigest()[:12]


def stamp(path: str | Path) -> tuple[int, int] | None:
    """Size and time of a file, which change when it does; None where there is none."""
    try:
        state = os.stat(path)
    except (OSError, ValueError):  # ValueError: no path at all, with a NUL
        return None
    return state.st_size, state.st_mtime_ns


def weights(*places: Path) -> str:
    """Short hash of the weights in files and folders: 5 GB take a few seconds.

    Args:
        *places: A file, or a folder of which those files count that are loaded as weights.

    Returns:
        Another one where the weights are others.
    """
    sums = sha256()
    for place in places:
        for path in [place] if place.is_file() else sorted(p for p in place.rglob("*") if WEIGHTS.fullmatch(p.name)):
            with path.open("rb") as file:
                sums.update(file_digest(file, "sha256").digest())
    return sums.hexdigest()[:12]


def write_json(path: Path, tree: Row | list[Row]) -> None:
    """Writes JSON in one move."""
    temporary = path.with_name(f".{path.name}.tmp")
    text = json.dumps(tree, indent=1, ensure_ascii=False)
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # a lone surrogate, as JSON escapes it
    os.replace(temporary, path)


def read_json(path: Path) -> Row:
    """A JSON file that holds an object; DataError where it is damaged."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({error})") from error
    if not isinstance(tree, dict):
        raise DataError(f"{path}: damaged (holds {tree!a:.40} where an object should be)")
    return tree


def identity_of(state: Row, folder: Path) -> Row:
    """The identity in what `_STARTED.json` or `_SUCCESS.json` says; DataError where it is none."""
    identity = state.get("identity")
    if not isinstance(identity, dict):
        raise DataError(f"{folder}: damaged (its identity is {identity!a:.40}); delete it and start again")
    return identity


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file; DataError where it is damaged or lacks a column."""
    try:
        table = pq.read_table(path, columns=columns)
        table.validate(full=True)  # texts are UTF-8
        return table
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DataError(f"{path}: not a whole Parquet file with the columns wanted ({error})") from error


def read_rows(folder: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """`good_rows` of a finished stage; DataError where it has not finished."""
    require_finished(folder)
    yield from good_rows(folder, columns)


def good_rows(folder: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Rows of a stage that are `ok`, file by file; of a stage that is being finished, if all its rows are there.

    Args:
        folder: Output folder of a stage.
        columns: Columns to read; default: all.

    Yields:
        A row as a dict.

    Raises:
        DataError: A file is damaged.
    """
    for path in sorted((folder / "data").glob("*.parquet")):
        for row in read_table(path, list({*columns, "status"}) if columns else None).to_pylist():
            if row["status"] == OK:
                yield row


def file_name(text: str) -> str:
    """A readable file name that no two texts share."""
    slug = re.sub(r"[^\w.-]+", "_", text)[-60:].strip("._") or "x"
    return slug if slug == text else f"{slug}-{sha256(text.encode()).hexdigest()[:8]}"
