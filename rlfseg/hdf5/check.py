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
from itertools import product
from typing import Any, NamedTuple, TypeAlias, cast

import h5py
import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

from rlfseg.errors import BadSample, RlfsegError
from rlfseg.hdf5.samples import unescape

GZIP, SHUFFLE, LZF = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_LZF
FILTERS = frozenset({(), (SHUFFLE,), (GZIP,), (SHUFFLE, GZIP), (LZF,), (SHUFFLE, LZF)})  # as they were applied
MAX_BYTES = 1 << 28  # of one data set, and of one chunk, decoded
MAX_SAMPLE_BYTES = 1 << 30  # of one sample, decoded
MAX_RATIO = 1100  # deflate itself ends at 1032 : 1
Item: TypeAlias = "h5py.Group | h5py.Dataset"
DAMAGED_GZIP = cast(type[Exception], zlib_ng.error)  # its stub calls it an instance
BROKEN = (OSError, LookupError, RuntimeError, ValueError, TypeError, DAMAGED_GZIP)  # what damaged files raise


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

    Args:
        path: The file.

    Returns:
        The open file; the caller closes it.

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

    Args:
        group: Where it lies.
        name: Its raw name.
        place: For messages.

    Returns:
        The group or data set.

    Raises:
        BadSample: A link that isn't hard.
    """
    if not group.id.links.exists(name):
        return None
    _require_hard(group.id.links.get_info(name), name, place)
    return group[name]


def _require_hard(link: h5py.h5l.LinkInfo, name: bytes, place: Place) -> None:
    if link.type != h5py.h5l.TYPE_HARD:
        raise place.bad(f"{text_of(name)!a} is a soft or external link; links are never followed, copy the data in")


def descend(group: h5py.Group, path: list[str], place: Place) -> Item | None:
    """Follows names down from a group, each read as UTF-8, else as Latin-1; None where the way ends.

    Args:
        group: Where the way starts.
        path: Names, outermost first.
        place: For messages.

    Returns:
        The group or data set at its end.

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
    """Every leaf under a group with its path of raw names, in the order of `_names`.

    Args:
        group: Where to start.
        is_leaf: Tells a leaf from a group to go into.
        place: For messages.
        path: Raw names that led to `group`.
        seen: Addresses of the groups met so far.

    Yields:
        Path of raw names, and the leaf.

    Raises:
        BadSample: A link that isn't hard, a group reached twice, or something that is neither leaf nor group.
    """
    seen = set() if seen is None else seen
    for name in _names(group, place):
        here, found = (*path, name), group[name]
        if is_leaf(found):
            yield here, found
            continue
        if not isinstance(found, h5py.Group):
            raise place.bad(f"{join(here)!a} doesn't belong there: the layout is id/image and id/mask/caption")
        address = h5py.h5o.get_info(found.id).addr
        if address in seen:
            raise place.bad(f"{join(here)!a} is a group that lies elsewhere in the file too")
        seen.add(address)
        yield from leaves(found, is_leaf, place, here, seen)


def _names(group: h5py.Group, place: Place) -> list[bytes]:
    """Raw names of a group's members: as they were added where the file tracks that, else in their own order."""
    added: list[tuple[int, bytes]] = []
    for name in group.id:
        link = group.id.links.get_info(name)
        _require_hard(link, name, place)
        added.append((link.corder if link.corder_valid else 0, name))
    return [name for _, name in sorted(added, key=lambda pair: pair[0])]


class Checked(NamedTuple):
    """A data set that is safe to read, and what its check found out."""

    data: h5py.Dataset
    what: str  # what errors call it
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...]  # empty where it has none
    filters: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its declared bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def check_dataset(item: Item | None, what: str, place: Place) -> Checked:
    """Refuses what is no data set, or one that is unsafe to read, without reading it.

    Args:
        item: The data set.
        what: What errors call it.
        place: Where it lies.

    Returns:
        What `read_array` takes.

    Raises:
        BadSample: See the module's text.
    """
    if not isinstance(item, h5py.Dataset) or item.shape is None:
        raise place.bad(f"{what} is not a data set with data")
    # By h5py's lower level: this runs for every mask, and there it costs a third.
    properties = item.id.get_create_plist()
    layout = properties.get_layout()
    filters = tuple(properties.get_filter(n)[0] for n in range(properties.get_nfilters()))
    chunks = properties.get_chunk() if layout == h5py.h5d.CHUNKED else ()
    if properties.get_external_count() or layout == h5py.h5d.VIRTUAL:
        raise place.bad(f"{what} keeps its data in another file (external or virtual); copy the data in")
    if filters not in FILTERS:
        raise place.bad(f"{what} uses HDF5 filters {list(filters)}; only gzip, lzf and shuffle, once each, are read")
    checked = Checked(item, what, item.shape, item.dtype, chunks, filters)
    if checked.dtype.kind not in "biuf":
        raise place.bad(f"{what} has type {checked.dtype}; only plain numbers are read")
    _check_sizes(checked, place)
    return checked


def _check_sizes(checked: Checked, place: Place) -> None:
    size, what = checked.size, checked.what
    chunk = math.prod(checked.chunks) * checked.dtype.itemsize if checked.chunks else 0
    if max(size, chunk) > MAX_BYTES:
        raise place.bad(f"{what} declares {size:,} bytes in chunks of {chunk:,}; the limit is {MAX_BYTES:,}")
    decoded, stored = size, checked.data.id.get_storage_size()
    if chunk:
        there = checked.data.id.get_num_chunks()
        needed = math.prod(-(-n // c) for n, c in zip(checked.shape, checked.chunks, strict=True))
        if there < needed:  # HDF5 would fill the holes with zeros
            raise place.bad(f"{what} is unfinished: {there} of its {needed} chunks were written")
        decoded = there * chunk
    if size and not stored:
        raise place.bad(f"{what} was never written")
    if stored > decoded + decoded // 8 + (1 << 20):  # chunks that gzip can't shrink grow by less
        raise place.bad(f"{what} claims that its {decoded:,} bytes are packed into {stored:,}")
    if decoded > MAX_RATIO * stored:
        raise place.bad(f"{what} unpacks {stored:,} bytes into {decoded:,}; more than {MAX_RATIO} times is refused")


def read_array(checked: Checked, place: Place) -> NDArray[Any]:
    """Reads a data set that has passed.

    HDF5 unpacks gzip without a bound, whatever size a chunk declares; here a chunk ends where it should. zlib-ng does
    it, which unpacks masks over ten times as fast as zlib.

    Args:
        checked: The data set.
        place: Where it lies.

    Returns:
        All of it, in its own shape and type; bool as int8.

    Raises:
        BadSample: Damaged, or more or less data than declared.
    """
    dtype, chunks = checked.dtype, checked.chunks
    if GZIP not in checked.filters:
        whole: NDArray[Any] = checked.data[()]
        return whole
    if dtype.itemsize > 1 and checked.data.id.get_type() != h5py.h5t.py_create(dtype):
        raise place.bad(f"{checked.what} has an unusual type of number")
    array: NDArray[Any] = np.empty(checked.shape, np.int8 if dtype.kind == "b" else dtype)
    for corner in product(*(range(0, n, c) for n, c in zip(array.shape, chunks, strict=True))):
        skipped, data = checked.data.id.read_direct_chunk(corner)
        used = [f for n, f in enumerate(checked.filters) if not skipped >> n & 1]
        block = _unpacked(data, used, math.prod(chunks) * dtype.itemsize, dtype.itemsize)
        if block is None:
            raise place.bad(f"{checked.what} is damaged: a chunk doesn't unpack to its size")
        part = array[tuple(slice(a, a + c) for a, c in zip(corner, chunks, strict=True))]
        part[...] = np.frombuffer(block, array.dtype).reshape(chunks)[tuple(map(slice, part.shape))]
    return array


def _unpacked(data: bytes, filters: list[int], size: int, itemsize: int) -> bytes | None:
    if GZIP in filters:
        stream = zlib_ng.decompressobj()
        data = stream.decompress(data, size + 1)
        if not stream.eof:  # its checksum stands at the end
            return None
    if len(data) != size:
        return None
    if SHUFFLE in filters:  # first all first bytes, then all second ones, ...
        return np.frombuffer(data, np.uint8).reshape(itemsize, -1).T.tobytes()
    return data


def stored_text(item: Item, key: str) -> str | None:
    """A text attribute as the writer put it, or None where there is none of that kind."""
    for name, decode in ((key.encode(), str), (f"{key}_escaped".encode(), unescape)):
        if h5py.h5a.exists(item.id, name):
            attribute = h5py.h5a.open(item.id, name)
            if attribute.shape != ():  # damaged or hostile: it may declare any number of texts
                continue
            value = np.empty((), attribute.dtype)
            attribute.read(value)
            if isinstance(value.item(), str | bytes):
                return decode(text_of(value.item()))
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
