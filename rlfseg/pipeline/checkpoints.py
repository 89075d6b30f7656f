"""Checkpoints that are whole or don't count, in any storage that pyarrow or fsspec reaches.

Ray Train lists them, deletes the worse ones and starts dead workers again. Ours is the trust: a checkpoint is sealed
with the hashes of its files, reported only after it has been read back from where it went, and a start takes the newest
one whose seal holds. So what a death left half written is never taken, and what was whole is never lost, even where
death came before Ray had heard of it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator
from hashlib import file_digest
from pathlib import Path
from uuid import uuid4

import fsspec
import pyarrow as pa
import stamina
from pyarrow.fs import (
    FileSelector,
    FileSystem,
    FileType,
    FSSpecHandler,
    LocalFileSystem,
    PyFileSystem,
    S3FileSystem,
    copy_files,
)
from ray.train import Checkpoint

from rlfseg.config import without_passwords
from rlfseg.errors import ConfigError, ResourceError
from rlfseg.pipeline.folders import not_shared

SEAL = "files.json"
PREFIX = "step-"
REGISTRY = "checkpoint_manager_snapshot.json"  # Ray Train's list of checkpoints
TRIES, FIRST_WAIT = 4, 2.0  # of a write that fails; seconds, doubled each time

logger = logging.getLogger(__name__)


def seal(folder: Path) -> None:
    """Notes the hash of every file, in a file written last."""
    files = {p.relative_to(folder).as_posix(): _digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    (folder / SEAL).write_text(json.dumps(files, indent=1))


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, None if all its files are as they were; what came later doesn't matter."""
    try:
        files = json.loads((folder / SEAL).read_text())
    except (OSError, ValueError) as error:
        return f"{SEAL} can't be read: {error}"
    for name, digest in files.items():
        try:
            if _digest(folder / name) != digest:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} can't be read: {error}"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


class Store:
    """The checkpoints of one training.

    Args:
        storage: Folder or URI that all nodes see.
        name: Of the training; the same name is the same training.

    Attributes:
        shown: `storage` for people, without a password.

    Raises:
        ConfigError: Nothing that pyarrow or fsspec can write to.
    """

    def __init__(self, storage: str, name: str):
        self.storage, self.name, self.shown = storage, name, without_passwords(storage)
        self.filesystem, self.root = _open(storage)
        self.folder = Path(self.root, name).as_posix()  # as Ray Train writes it

    def ready(self) -> None:
        """Writes and deletes a file, and mends what an earlier start has left; before anything is computed.

        Raises:
            ConfigError: That can't be done.
        """
        path = f"{self.folder}/.{uuid4().hex}"
        try:
            self.filesystem.create_dir(self.folder, recursive=True)
            with self.filesystem.open_output_stream(path) as file:
                file.write(b"rlfseg")
            self.filesystem.delete_file(path)
            self._mend()
        except OSError as error:
            raise ConfigError(f"storage: {self.shown} can't be written to: {error}") from error

    def unseen(self) -> ConfigError | None:
        """The error of a node that doesn't see the folder that `ready` has made on another; None where it does."""
        if not isinstance(self.filesystem, LocalFileSystem) or Path(self.folder).is_dir():
            return None
        return not_shared("storage", self.shown)

    def newest_first(self) -> Iterator[Checkpoint]:
        """All that lie there, whole or not, the latest step first."""
        infos = self.filesystem.get_file_info(FileSelector(self.folder, allow_not_found=True))
        names = sorted((i.base_name for i in infos if i.base_name.startswith(PREFIX)), reverse=True)
        return (self.checkpoint(name) for name in names)

    def newest_step(self) -> int:
        """Of the newest checkpoint, whole or not; 0 where there is none."""
        newest = next(self.newest_first(), None)
        return int(Path(newest.path).name.split("-")[1]) if newest else 0

    def whole(self) -> Iterator[tuple[Checkpoint, Path]]:
        """Those whose seal holds, the latest step first, each with its files on this machine while it is looked at."""
        for checkpoint in self.newest_first():
            with checkpoint.as_directory() as local:
                if wrong := damage(Path(local)):
                    logger.warning("checkpoint %s is passed over: %s", checkpoint.path, wrong)
                else:
                    yield checkpoint, Path(local)

    def keep(self, step: int, save: Callable[[Path], None]) -> Checkpoint:
        """Writes a checkpoint and reads it back; a storage that fails gets a few tries.

        Args:
            step: Its step.
            save: Writes its files into a folder.

        Returns:
            The checkpoint, whole.

        Raises:
            ResourceError: It can't be written; nothing of it is left.
        """
        name = f"{PREFIX}{step:08d}-{uuid4().hex[:8]}"  # never twice: a repeated step must not mix with its first try
        uploading = False
        try:
            for attempt in stamina.retry_context(
                on=OSError, attempts=TRIES, timeout=None, wait_initial=FIRST_WAIT, wait_max=60.0, wait_jitter=0.0
            ):
                with attempt, tempfile.TemporaryDirectory(prefix="rlfseg-") as local:
                    uploading = False
                    save(Path(local))
                    seal(Path(local))
                    uploading = True
                    self._upload(local, name)
        except OSError as error:
            # What goes to a bucket is written, and read back, on this machine
            is_storage = uploading and isinstance(self.filesystem, LocalFileSystem)
            full = "the disk is full" if is_storage else f"the disk of {tempfile.gettempdir()} here is full"
            why = full if error.errno == errno.ENOSPC else str(error)
            raise ResourceError(
                f"storage: the checkpoint of step {step} can't be written to {self.shown}: {why}. The one before is "
                "kept; make room and give the same command again to go on from there"
            ) from error
        return self.checkpoint(name)

    def discard(self, checkpoint: Checkpoint) -> None:
        """Deletes a checkpoint, or what there is of one."""
        with contextlib.suppress(OSError):
            self.filesystem.delete_dir(checkpoint.path)

    def sweep(self, kept: Collection[str]) -> None:
        """Deletes what deaths left behind: all but the checkpoints with these paths; nothing if there are none."""
        for checkpoint in self.newest_first():
            if kept and checkpoint.path not in kept:
                self.discard(checkpoint)

    def _mend(self) -> None:
        """Removes Ray's list of checkpoints if half of it is missing: a death or a full disk while it was written."""
        path = f"{self.folder}/{REGISTRY}"
        try:
            with self.filesystem.open_input_stream(path) as file:
                listed = json.loads(file.read())["checkpoint_results"]
            missing = [r["checkpoint_dir_name"] for r in listed if not self._exists(r["checkpoint_dir_name"])]
        except FileNotFoundError:
            return
        except (ValueError, KeyError) as error:
            missing = [f"unreadable, {error}"]
        if missing:
            logger.warning("%s is dropped (%s); the checkpoints themselves are still there", path, missing[0])
            self.filesystem.delete_file(path)

    def _upload(self, local: str, name: str) -> None:
        checkpoint = self.checkpoint(name)
        try:
            self.filesystem.create_dir(checkpoint.path, recursive=True)
            # pyarrow's threads can hang in uploads to S3: apache/arrow#32372
            threads = not isinstance(self.filesystem, S3FileSystem)
            copy_files(local, checkpoint.path, destination_filesystem=self.filesystem, use_threads=threads)
            with checkpoint.as_directory() as copy:
                if wrong := damage(Path(copy)):
                    raise OSError(errno.EIO, f"read back differently: {wrong}", checkpoint.path)
        except OSError:
            self.discard(checkpoint)
            raise

    def checkpoint(self, name: str) -> Checkpoint:
        """The one of that name, whether it is there or not."""
        return Checkpoint(f"{self.folder}/{name}", self.filesystem)

    def _exists(self, name: str) -> bool:
        return bool(self.filesystem.get_file_info(f"{self.folder}/{name}").type != FileType.NotFound)


def _open(storage: str) -> tuple[FileSystem, str]:
    try:
        return FileSystem.from_uri(storage)  # type: ignore[no-any-return]
    except pa.ArrowInvalid:
        pass  # not one of pyarrow's own
    except OSError as error:
        raise ConfigError(f"storage: {without_passwords(storage)} can't be reached: {error}") from error
    try:
        filesystem, path = fsspec.core.url_to_fs(storage)
    except (ValueError, ImportError, OSError) as error:
        shown = without_passwords(storage)
        raise ConfigError(f"storage: {shown!r} is no folder and no URI that can be written to: {error}") from error
    return PyFileSystem(FSSpecHandler(filesystem)), path
