"""HDF5 files of samples: written whole or not at all, read one sample at a time."""

from __future__ import annotations

import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from rlfseg.errors import BadSample, ResourceError, RlfsegError
from rlfseg.hdf5.check import (
    MAX_SAMPLE_BYTES,
    Checked,
    Item,
    Place,
    check_dataset,
    descend,
    join,
    leaves,
    member,
    open_file,
    read_array,
    stored_text,
)
from rlfseg.hdf5.samples import Labelled, Sample, check_sample, escape, fingerprint, quoted
from rlfseg.images import to_binary

SCHEMA_VERSION = 1
AnyPath = str | os.PathLike[str]
T = TypeVar("T")


# --- writing -----------------------------------------------------------------------------------------------------


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
            _put(file, sample)
            digests[sample.id] = fingerprint(sample)
    return digests


def _put(file: h5py.File, sample: Sample) -> None:
    group = file.create_group(escape(sample.id))
    _put_text(group, "id", sample.id)
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
    with _opened(temporary) as file:
        for sample_id, digest in digests.items():
            if fingerprint(_sample(file, sample_id, Place(str(path), sample_id))) != digest:
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
        raise ResourceError(f"{path}: can't be written ({error}); is the disk full or the folder read-only?") from error


# --- reading -----------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: AnyPath) -> Iterator[h5py.File]:
    file = open_file(path)
    try:
        yield file
    finally:
        file.close()


def iter_ids(path: AnyPath) -> Iterator[str]:
    """The ids of a file's samples in the order of their names; BadSample if it is damaged or holds anything else."""
    place = Place(str(path))
    with _opened(path) as file, place.reading():
        ids = [sample_id for sample_id, _ in _samples(file, place)]
    yield from ids


def read_sample(path: AnyPath, sample_id: str) -> Sample:
    """One sample of a file, every data set checked before it is read.

    Args:
        path: The file.
        sample_id: Id of the sample.

    Returns:
        The sample, in memory.

    Raises:
        BadSample: The file or the sample is missing, damaged or refused.
    """
    with _opened(path) as file:
        return _sample(file, sample_id, Place(str(path), sample_id))


def read_image(path: AnyPath, sample_id: str) -> NDArray[np.uint8]:
    """The picture of one sample, uint8 RGB [H, W, 3]; raises as `read_sample`."""
    with _opened(path) as file:
        return _image(file, sample_id, Place(str(path), sample_id))


def read_captions(path: AnyPath, sample_id: str) -> tuple[str, ...]:
    """The captions of one sample, in order, without reading pixels; raises as `read_sample`."""
    with _opened(path) as file:
        return _captions(file, sample_id, Place(str(path), sample_id))


class Reader:
    """Samples of many shards, with the last few kept open.

    Pickles as its folder's name and opens files anew in every process, also after a fork; threads take turns.

    Args:
        folder: Where the shards' names, as the index gives them, start from.
        max_open: Files kept open.
    """

    def __init__(self, folder: AnyPath, max_open: int = 16):
        self.folder, self.max_open = Path(folder), max_open
        self._start()

    def __reduce__(self) -> tuple[type[Reader], tuple[Path, int]]:
        """Handles stay behind: HDF5's can't be pickled."""
        return Reader, (self.folder, self.max_open)

    def sample(self, shard: str, sample_id: str) -> Sample:
        """As `read_sample`."""
        return self._read(_sample, shard, sample_id)

    def image(self, shard: str, sample_id: str) -> NDArray[np.uint8]:
        """As `read_image`."""
        return self._read(_image, shard, sample_id)

    def captions(self, shard: str, sample_id: str) -> tuple[str, ...]:
        """As `read_captions`."""
        return self._read(_captions, shard, sample_id)

    def close(self) -> None:
        """Closes every file; the next read opens them again."""
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()

    def _start(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._files: OrderedDict[str, h5py.File] = OrderedDict()

    def _read(self, read: Callable[[h5py.File, str, Place], T], shard: str, sample_id: str) -> T:
        if self._pid != os.getpid():
            self._start()  # after a fork neither the parent's files nor its lock are ours
        path = str(self.folder / shard)
        place = Place(path, sample_id)
        with self._lock, place.reading():
            file = self._files.pop(path, None) or open_file(path)
            self._files[path] = file
            if len(self._files) > self.max_open:
                self._files.popitem(last=False)[1].close()
            return read(file, sample_id, place)


class _Entry(NamedTuple):
    """A phrase whose data sets aren't read yet."""

    caption: str
    task: str | None
    mask: Checked
    instances: Checked | None


def _sample(file: h5py.File, sample_id: str, place: Place) -> Sample:
    with place.reading():
        image, entries = _parts(_find(file, sample_id, place), place)
        phrases = tuple(_read_phrase(entry, place) for entry in entries)
        return Sample(id=sample_id, image=read_array(image, place), phrases=phrases)


def _image(file: h5py.File, sample_id: str, place: Place) -> NDArray[np.uint8]:
    with place.reading():
        return read_array(_checked_image(_find(file, sample_id, place), place), place)


def _captions(file: h5py.File, sample_id: str, place: Place) -> tuple[str, ...]:
    with place.reading():
        return tuple(entry.caption for entry in _parts(_find(file, sample_id, place), place)[1])


def _read_phrase(entry: _Entry, place: Place) -> Labelled:
    mask = to_binary(read_array(entry.mask, place), file=place.file, sample=place.sample)
    if entry.instances is None:
        return Labelled(caption=entry.caption, mask=mask, task=entry.task)
    instances = read_array(entry.instances, place)
    if instances.max(initial=0) > 1 or not np.array_equal(np.bitwise_or.reduce(instances, axis=0), mask):
        raise place.bad(f"{entry.instances.what} don't add up to its mask")
    return Labelled(caption=entry.caption, mask=mask, instances=instances.view(np.uint8), task=entry.task)


def _find(file: h5py.File, sample_id: str, place: Place) -> h5py.Group:
    """The group of an id: by its escaped name, else by the name as it stands."""
    for path in ([escape(sample_id)], sample_id.split("/")):
        group = descend(file, path, place)
        if isinstance(group, h5py.Group) and _id("/".join(path), group) == sample_id:
            return group
    raise place.bad("no such sample in this file")


def _id(name: str, group: h5py.Group) -> str:
    """The id of a sample: its attribute where that belongs to its name, else the name as it stands."""
    stored = stored_text(group, "id")
    return stored if stored is not None and escape(stored) == name else name


def _samples(file: h5py.File, place: Place) -> Iterator[tuple[str, h5py.Group]]:
    for path, group in leaves(file, _is_sample, place):
        yield _id(join(path), group), group


def _is_sample(item: Item) -> bool:
    """A group that should be a sample, whole or not; any other group is a part of an id that has slashes."""
    links = item.id.links if isinstance(item, h5py.Group) else None
    return links is not None and (links.exists(b"image") or links.exists(b"mask") or not len(item))


def _parts(group: h5py.Group, place: Place) -> tuple[Checked, list[_Entry]]:
    """A sample's data sets, all checked."""
    image = _checked_image(group, place)
    masks, objects = member(group, b"mask", place), member(group, b"instances", place)
    if not isinstance(masks, h5py.Group):
        raise place.bad("has no group 'mask'")
    entries: list[_Entry] = []
    for path, mask in leaves(masks, lambda item: isinstance(item, h5py.Dataset), place):
        stored = stored_text(mask, "caption")
        caption = join(path) if stored is None else stored
        # Only our own files have instances, and their names don't nest.
        found = member(objects, path[-1], place) if isinstance(objects, h5py.Group) else None
        instances = None if found is None else _checked_instances(found, quoted(caption), image, place)
        checked = _checked_mask(mask, quoted(caption), image, place)
        entries.append(_Entry(caption, stored_text(mask, "task"), checked, instances))
    total = image.size + sum(e.mask.size + (0 if e.instances is None else e.instances.size) for e in entries)
    if total > MAX_SAMPLE_BYTES:
        raise place.bad(f"declares {total:,} bytes in all; the limit is {MAX_SAMPLE_BYTES:,}")
    return image, entries


def _checked_image(group: h5py.Group, place: Place) -> Checked:
    image = check_dataset(member(group, b"image", place), "the image", place)
    if image.dtype != np.uint8 or len(image.shape) != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise place.bad(f"the image must be uint8 [H, W, 3], this is {image.dtype} {list(image.shape)}")
    return image


def _checked_mask(item: Item, caption: str, image: Checked, place: Place) -> Checked:
    mask = check_dataset(item, f"the mask of {caption}", place)
    if mask.shape != image.shape[:2]:
        raise place.bad(f"{mask.what} must be {list(image.shape[:2])} like the image, this is {list(mask.shape)}")
    return mask


def _checked_instances(item: Item, caption: str, image: Checked, place: Place) -> Checked:
    masks = check_dataset(item, f"the instances of {caption}", place)
    if masks.dtype.kind not in "bu" or masks.dtype.itemsize != 1 or masks.shape[1:] != image.shape[:2]:
        wanted = f"uint8 [n, {image.shape[0]}, {image.shape[1]}]"
        raise place.bad(f"{masks.what} must be {wanted}, this is {masks.dtype} {list(masks.shape)}")
    return masks


def index_rows(path: Path, shard: str) -> Iterator[dict[str, Any] | BadSample]:
    """A row of the index for every sample of a file, or what is wrong with it; no pixel is read.

    Args:
        path: The file.
        shard: What the index calls it.

    Yields:
        The columns of `index.INDEX_SCHEMA`, or the error of a bad sample or file.
    """
    place = Place(str(path))
    try:
        with _opened(path) as file, place.reading():
            for sample_id, group in _samples(file, place):
                yield _row(sample_id, shard, group, place._replace(sample=sample_id))
    except BadSample as error:
        yield error


def _row(sample_id: str, shard: str, group: h5py.Group, place: Place) -> dict[str, Any] | BadSample:
    try:
        with place.reading():
            image, entries = _parts(group, place)
            parts = [image, *(e.mask for e in entries), *(e.instances for e in entries if e.instances is not None)]
            return {
                "id": sample_id,
                "shard": shard,
                "height": image.shape[0],
                "width": image.shape[1],
                "captions": [e.caption for e in entries],
                "n_phrases": len(entries),
                "bytes": sum(part.data.id.get_storage_size() for part in parts),
            }
    except BadSample as error:
        return error
