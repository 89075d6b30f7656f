"""Writing HDF5 files of samples: whole, read back and under their name, or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from rlfseg.errors import BadSample, ResourceError, RlfsegError
from rlfseg.hdf5.check import Item, Place
from rlfseg.hdf5.reading import AnyPath, opened, sample_in
from rlfseg.hdf5.samples import Sample, check_sample, escape, fingerprint

SCHEMA_VERSION = 1


def write_shard(
    path: AnyPath, samples: Iterable[Sample], attributes: Mapping[str, str | int | float] | None = None
) -> int:
    """Writes samples to an HDF5 file that appears under its name only once it is whole and has been read back.

    Args:
        path: The file; an older one is replaced.
        samples: Drawn one at a time; ids must differ.
        attributes: Facts about the shard, stored at the file's root.

    Returns:
        How many samples it holds.

    Raises:
        BadSample: A sample that `check_sample` refuses, or an id that came before.
        DataError: What was read back differs from what was written.
        ResourceError: The file can't be written, e.g. on a full disk.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with _writing(path):
            digests = _write(temporary, samples, attributes or {}, str(path))
            _verify(temporary, digests, path)
            _publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(digests)


def _write(temporary: Path, samples: Iterable[Sample], attributes: Mapping[str, Any], name: str) -> dict[str, bytes]:
    digests: dict[str, bytes] = {}
    # Nobody else knows the file yet; locks fail on some network drives.
    with h5py.File(temporary, "x", locking=False) as file:
        file.attrs.update({**attributes, "rlfseg_schema": SCHEMA_VERSION})
        for sample in samples:
            check_sample(sample, file=name)
            if sample.id in digests:
                raise BadSample("this id came before", file=name, sample=sample.id)
            digests[sample.id] = fingerprint(sample)
            _put(file, sample, digests[sample.id])
    return digests


def _put(file: h5py.File, sample: Sample, digest: bytes) -> None:
    group = file.create_group(escape(sample.id))
    _put_text(group, "id", sample.id)
    _put_text(group, "digest", digest.hex())
    if sample.coco_id is not None:
        _put_text(group, "coco_id", sample.coco_id)
    group.create_dataset("image", data=sample.image)
    masks = group.create_group("mask", track_order=True)
    for phrase in sample.phrases:
        name = _free_name(masks, escape(phrase.caption))
        mask = masks.create_dataset(name, data=phrase.mask, compression="gzip", chunks=phrase.mask.shape)
        _put_text(mask, "caption", phrase.caption)
        if phrase.task is not None:
            _put_text(mask, "task", phrase.task)
        if phrase.instances is not None:
            _put_instances(group.require_group("instances"), name, phrase.instances)


def _put_instances(group: h5py.Group, name: str, instances: NDArray[np.uint8]) -> None:
    if len(instances):
        group.create_dataset(name, data=instances, compression="gzip", chunks=(1, *instances.shape[1:]))
    else:  # HDF5 has no chunks larger than the data
        group.create_dataset(name, data=instances)


def _put_text(item: Item, key: str, text: str) -> None:
    # HDF5's strings end at NUL.
    item.attrs[f"{key}_escaped" if "\0" in text else key] = escape(text) if "\0" in text else text


def _free_name(group: h5py.Group, name: str) -> str:
    free, number = name, 1
    while free in group:
        number += 1
        free = f"{name}#{number}"
    return free


def _verify(temporary: Path, digests: dict[str, bytes], path: Path) -> None:
    with opened(temporary) as file:
        for sample_id, digest in digests.items():
            if fingerprint(sample_in(file, sample_id, Place(str(path), sample_id))) != digest:
                raise BadSample("reads back differently from what was written", file=str(path), sample=sample_id)


def _publish(temporary: Path, path: Path) -> None:
    """Renames a finished file into place, so that it is there after a power cut too."""
    for target in (temporary, path.parent):
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if target == temporary:
            os.replace(temporary, path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except RlfsegError:
        raise
    except (OSError, RuntimeError) as error:
        number = error.errno if isinstance(error, OSError) else None
        why = os.strerror(number) if number else " ".join(str(error).split())  # HDF5's own texts have several lines
        raise ResourceError(f"{path}: can't be written ({why}); is the disk full or the folder read-only?") from error
