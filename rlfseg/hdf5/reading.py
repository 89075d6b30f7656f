"""Reading HDF5 files of samples, one sample at a time, every data set checked before it is read."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from rlfseg.errors import BadSample
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
from rlfseg.hdf5.samples import Labelled, Sample, escape, fingerprint, quoted
from rlfseg.images import to_binary

AnyPath = str | os.PathLike[str]
T = TypeVar("T")


@contextmanager
def opened(path: AnyPath) -> Iterator[h5py.File]:
    """A file, closed at the end; raises as `check.open_file`."""
    file = open_file(path)
    try:
        yield file
    finally:
        file.close()


def iter_ids(path: AnyPath) -> Iterator[str]:
    """The ids of a file's samples in the order of their names; BadSample if it is damaged or holds anything else."""
    place = Place(str(path))
    with opened(path) as file, place.reading():
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
    with opened(path) as file:
        return sample_in(file, sample_id, Place(str(path), sample_id))


def read_image(path: AnyPath, sample_id: str) -> NDArray[np.uint8]:
    """The picture of one sample, uint8 RGB [H, W, 3]; raises as `read_sample`."""
    with opened(path) as file:
        return _image(file, sample_id, Place(str(path), sample_id))


def read_captions(path: AnyPath, sample_id: str) -> tuple[str, ...]:
    """The captions of one sample, in order, without reading pixels; raises as `read_sample`."""
    with opened(path) as file:
        return _captions(file, sample_id, Place(str(path), sample_id))


def root_texts(path: AnyPath, keys: Iterable[str]) -> dict[str, str]:
    """Those of the text attributes at a file's root that it has, as `write_shard` stores them; raises as `iter_ids`."""
    place = Place(str(path))
    with opened(path) as file, place.reading():
        texts = {key: stored_text(file["/"], key) for key in keys}
    return {key: text for key, text in texts.items() if text is not None}


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
        return self._read(sample_in, shard, sample_id)

    def verified(self, shard: str, sample_id: str) -> Sample:
        """As `sample`, and refused where it differs from the digest that its writer left, if it left one."""
        return self._read(_verified, shard, sample_id)

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


def sample_in(file: h5py.File, sample_id: str, place: Place) -> Sample:
    """As `read_sample`, from an open file."""
    with place.reading():
        group = _find(file, sample_id, place)
        image, entries = _parts(group, place)
        phrases = tuple(_read_phrase(entry, place) for entry in entries)
        coco_id = stored_text(group, "coco_id")
        return Sample(id=sample_id, image=read_array(image, place), phrases=phrases, coco_id=coco_id)


def _verified(file: h5py.File, sample_id: str, place: Place) -> Sample:
    sample = sample_in(file, sample_id, place)
    digest = stored_text(_find(file, sample_id, place), "digest")
    if digest not in (None, fingerprint(sample).hex()):
        raise place.bad("was changed or damaged since it was written: it doesn't match its digest")
    return sample


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
        with opened(path) as file, place.reading():
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
                "coco_id": stored_text(group, "coco_id"),
                "bytes": sum(part.data.id.get_storage_size() for part in parts),
            }
    except BadSample as error:
        return error
