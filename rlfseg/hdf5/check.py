"""What HDF5 files declare is not believed: every step into one, and every data set, is checked before it is read.

Refused are links other than hard ones and groups met twice (a file could reach out of itself or run in circles), data
kept in other files (`external`, virtual), filters other than gzip, lzf and shuffle (they load plugins), types that
aren't plain numbers (objects and references), sizes over the limits, holes, and compression beyond deflate's own limit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import h5py

from rlfseg.errors import BadSample, RlfsegError
from rlfseg.hdf5.samples import unescape

FILTERS = frozenset({h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_LZF})
MAX_BYTES = 1 << 28  # of one data set, and of one chunk, decoded
MAX_SAMPLE_BYTES = 1 << 30  # of one sample, decoded
MAX_RATIO = 1100  # deflate itself ends at 1032 : 1, so only stacked filters lie above
Item: TypeAlias = "h5py.Group | h5py.Dataset"
BROKEN = (OSError, LookupError, RuntimeError, ValueError, TypeError)  # what h5py raises on damaged files


class Place(NamedTuple):
    """Where a reader is, for its errors."""

    file: str
    sample: str | None = None

    def bad(self, reason: str) -> BadSample:
        """The error for something wrong here."""
        return BadSample(reason, file=self.file, sample=self.sample)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turns what h5py raises on damage into `BadSample`."""
        try:
            yield
        except RlfsegError:
            raise
        except BROKEN as error:
            raise self.bad(f"damaged ({error})") from error


def open_file(path: str | os.PathLike[str]) -> h5py.File:
    """Opens a file for reading, without locks: shards never change once they have their name.

    Raises:
        BadSample: Missing, truncated or not HDF5.
    """
    try:
        return h5py.File(path, "r", locking=False)
    except FileNotFoundError:
        raise BadSample("no such file", file=str(path)) from None
    except BROKEN as error:
        raise BadSample(f"not a whole HDF5 file ({error})", file=str(path)) from error


def member(group: h5py.Group, name: bytes, place: Place) -> Item | None:
    """A member by its raw name; None where there is none.

    Raises:
        BadSample: A link that isn't hard.
    """
    if not group.id.links.exists(name):
        return None
    if group.id.links.get_info(name).type != h5py.h5l.TYPE_HARD:
        raise place.bad(f"{text_of(name)!a} is a soft or external link; links are never followed, copy the data in")
    return group[name]


def descend(group: h5py.Group, path: list[str], place: Place) -> Item | None:
    """Follows names down from a group, each read as UTF-8, else as Latin-1; None where the way ends.

    Raises:
        BadSample: A link that isn't hard.
    """
    found: Item | None = group
    for name in path:
        # HDF5 would read an empty name or a dot as the group itself, and end a name at NUL.
        if not isinstance(found, h5py.Group) or name in ("", ".") or "\0" in name:
            return None
        here = found
        raw = [name.encode("utf-8", "surrogatepass"), name.encode("latin-1", "replace")]
        found = next((m for r in raw if (m := member(here, r, place)) is not None and text_of(r) == name), None)
    return found


def leaves(
    group: h5py.Group,
    is_leaf: Callable[[Item], bool],
    place: Place,
    path: tuple[bytes, ...] = (),
    seen: set[int] | None = None,
) -> Iterator[tuple[tuple[bytes, ...], Item]]:
    """Every leaf under a group with its path of raw names, in the order of names.

    Raises:
        BadSample: A link that isn't hard, a group reached twice, or something that is neither leaf nor group.
    """
    seen = set() if seen is None else seen
    for name in group.id:
        here, found = (*path, name), member(group, name, place)
        if found is not None and is_leaf(found):
            yield here, found
            continue
        if not isinstance(found, h5py.Group):
            raise place.bad(f"{join(here)!a} doesn't belong there: the layout is id/image and id/mask/caption")
        address = h5py.h5o.get_info(found.id).addr
        if address in seen:
            raise place.bad(f"{join(here)!a} is a group that lies elsewhere in the file too")
        seen.add(address)
        yield from leaves(found, is_leaf, place, here, seen)


def check_dataset(dataset: h5py.Dataset, what: str, place: Place) -> int:
    """Refuses a data set that is unsafe to read, without reading it.

    Args:
        dataset: The data set.
        what: What errors call it.
        place: Where it lies.

    Returns:
        Its declared bytes.

    Raises:
        BadSample: See the module's text.
    """
    if dataset.external or dataset.is_virtual:
        raise place.bad(f"{what} keeps its data in another file (external or virtual); copy the data in")
    properties = dataset.id.get_create_plist()
    foreign = {properties.get_filter(i)[0] for i in range(properties.get_nfilters())} - FILTERS
    if foreign:
        raise place.bad(f"{what} uses HDF5 filters {sorted(foreign)}; only gzip, lzf and shuffle are read")
    if dataset.dtype.kind not in "biuf":
        raise place.bad(f"{what} has type {dataset.dtype}; only plain numbers are read")
    size: int = math.prod(dataset.shape or (0,)) * dataset.dtype.itemsize
    chunk: int = math.prod(dataset.chunks or (0,)) * dataset.dtype.itemsize
    if max(size, chunk) > MAX_BYTES:
        raise place.bad(f"{what} declares {size:,} bytes in chunks of {chunk:,}; the limit is {MAX_BYTES:,}")
    _check_stored(dataset, size, chunk, what, place)
    return size


def _check_stored(dataset: h5py.Dataset, size: int, chunk: int, what: str, place: Place) -> None:
    stored, decoded = dataset.id.get_storage_size(), size
    if chunk:
        there = dataset.id.get_num_chunks()
        needed = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
        if there < needed:  # HDF5 would fill the holes with zeros
            raise place.bad(f"{what} is unfinished: {there} of its {needed} chunks were written")
        decoded = there * chunk
    if size and not stored:
        raise place.bad(f"{what} was never written")
    if decoded > MAX_RATIO * stored:
        raise place.bad(f"{what} unpacks {stored:,} bytes into {decoded:,}; more than {MAX_RATIO} times is refused")


def stored_text(item: Item, key: str) -> str | None:
    """A text attribute as the writer put it, or None where there is none of that kind."""
    for name, decode in ((key, str), (f"{key}_escaped", unescape)):
        if h5py.h5a.exists(item.id, name.encode()):
            value = item.attrs[name]
            if isinstance(value, str | bytes):
                return decode(text_of(value))
    return None


def text_of(raw: str | bytes) -> str:
    """A name or text from a file: UTF-8, else Latin-1."""
    raw = raw.encode("utf-8", "surrogateescape") if isinstance(raw, str) else raw
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def join(path: tuple[bytes, ...]) -> str:
    """Nested names as the caption or id that they were before HDF5 split it at its slashes."""
    return "/".join(map(text_of, path))
