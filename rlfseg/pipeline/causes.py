"""What a user must see of an error that Ray hands on: its cause, in a line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from errno import ENOSPC
from pathlib import Path

from ray.exceptions import OutOfDiskError, RayTaskError

from rlfseg.errors import ResourceError, RlfsegError

ADVICE = "\nFailed to apply UDF transform after "  # Ray Data appends what may be set to try again, which doesn't help
FULL_GPU = re.compile("CUDA.{0,20}out of memory")  # and not Ray's page on nodes that are out of memory


def our_cause(error: BaseException | None) -> RlfsegError | None:
    """The first of our own errors in a chain of causes, without what Ray has added to its text."""
    # Ray's own is both
    ours = (e for e in _causes(error) if isinstance(e, RlfsegError) and not isinstance(e, RayTaskError))
    found = next(ours, None)
    if found is not None:
        found.args = tuple(a.partition(ADVICE)[0] if isinstance(a, str) else a for a in found.args)
    return found


def full_disk(error: BaseException, out: Path) -> ResourceError | None:
    """What to say where a full disk is among the causes: the output's, or the one that Ray's object store spills to."""
    if any(isinstance(e, OutOfDiskError) for e in _causes(error)):
        return ResourceError(
            f"{out}: Ray's object store is full, and so is the disk that it spills to; give it more of either, or set "
            "a smaller run.loaders, and start again: what is written stays, and it goes on"
        )
    # by its text too: on the way from a worker the number gets lost
    if any(isinstance(e, OSError) and (e.errno == ENOSPC or "No space left" in str(e)) for e in _causes(error)):
        return ResourceError(
            f"{out}: the disk is full; make room and start again: what is written stays, and it goes on"
        )
    return None


def full_gpu(error: BaseException, out: Path) -> ResourceError | None:
    """What to say where a GPU was too small for what a call had it do; who starts again may lower both settings."""
    if any(FULL_GPU.search(str(e)) for e in _causes(error)):
        return ResourceError(
            f"{out}: a GPU's memory is full; lower fast.max_batch (where the command has it) or run.batch_size, or "
            "have fewer share it by run.gpus, and start again: what is written stays, and it goes on"
        )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """A chain of causes, as Ray nests them."""
    while error is not None:
        yield error
        error = getattr(error, "cause", None) or error.__cause__
