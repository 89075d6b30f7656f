"""What `predict` works on: pictures with the phrases to ask of each, wherever they lie.

    a folder of `prepare` or `refine`   its pictures, and its captions where no phrases are given
    HDF5 files                          the same, of anybody who follows the paper's layout; local
    Parquet files                       a row a picture: `path`, or `image` with the file's bytes; a column of phrases
    pictures                            as they are

Each of the last three is a file, a folder, a glob, or such at a URL that fsspec knows: s3://bucket/folder/*.jpg.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rlfseg import hdf5, images
from rlfseg.errors import BadSample, ConfigError, DataError
from rlfseg.pipeline.rows import Row
from rlfseg.pipeline.samples import open_samples
from rlfseg.results import checked_phrase

Asked = tuple[NDArray[np.uint8], list[str]]  # uint8 RGB [H, W, 3], and what to look for in it
HDF5, PARQUET = hdf5.index.SUFFIXES, frozenset({".parquet"})


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures to work on.

    Attributes:
        rows: Index, a row a picture: `id`, and whatever `read` needs.
        read: Picklable, index row -> picture and phrases; raises BadSample.
        fingerprint: Changes with the ids and their phrases.
    """

    rows: pa.Table
    read: Callable[[Row], Asked]
    fingerprint: str


def find(source: str, phrases: list[str], column: str, *, pixels: int = images.MAX_PIXELS) -> Pictures:
    """Finds pictures without decoding any.

    Args:
        source: See the top of this file.
        phrases: To ask of every picture.
        column: Of Parquet files: text or lists of text, the phrases of each picture, asked before `phrases`.
        pixels: Largest height times width of a picture that is a file or bytes.

    Returns:
        The pictures, each with at least one phrase but for those of HDF5 files, which tell when they are read.

    Raises:
        BadSample: An HDF5 file can't be listed.
        ConfigError: There is no picture, several kinds of files, or a picture without phrases.
        DataError: A Parquet file or a URL can't be read.
    """
    if (Path(source) / "_STARTED.json").is_file():
        samples = open_samples(source)
        rows = samples.rows.select(["id", "shard"])
        return Pictures(rows=rows, read=OfShards(samples.folder, phrases), fingerprint=samples.fingerprint)
    files = _files(source)
    kinds = {_kind(file) for file in files}
    if not files or len(kinds) > 1:
        told = f"holds {' and '.join(sorted(kinds))}: say which, by a glob" if files else "names no picture"
        raise ConfigError(
            f"images: {source} {told}; give a picture, a folder, a glob, Parquet, HDF5, or a folder of `prepare`"
        )
    if "HDF5 files" in kinds:
        return _made(_hdf5_rows(files), OfShards(Path("/"), phrases))
    if "pictures" in kinds:
        return _made([{"id": file, "captions": phrases} for file in files], partial(read_file, pixels=pixels))
    listed = [row for file in files for row in _parquet_rows(file, column, needed=not phrases)]
    asked = [row | {"captions": [*row["captions"], *phrases]} for row in _merged(listed)]
    if not asked:
        raise ConfigError(f"images: {source} has no rows")
    return _made(asked, partial(read_embedded if "group" in asked[0] else read_file, pixels=pixels))


def _made(rows: list[Row], read: Callable[[Row], Asked]) -> Pictures:
    silent = next((row["id"] for row in rows if row.get("captions") == []), None)
    if silent is not None:
        raise ConfigError(f"phrases: empty, and {silent} brings none of its own; give e.g. --phrases '[\"red ring\"]'")
    seen: set[str] = set()
    for row in rows:
        if row["id"] in seen:
            raise DataError(f"images: {row['id']} is there twice")
        seen.add(row["id"])
    told = sha256(repr([(row["id"], row.get("captions")) for row in rows]).encode(errors="surrogatepass"))
    return Pictures(rows=pa.Table.from_pylist(rows), read=read, fingerprint=told.hexdigest()[:12])


# --- which files -----------------------------------------------------------------------------------------------------


def _files(source: str) -> list[str]:
    """Absolute paths or URLs, sorted; of a folder those with a suffix that tells what they are."""
    try:
        fs, path = fsspec.core.url_to_fs(source)
        if fs.isdir(path):
            known = images.SUFFIXES | HDF5 | PARQUET
            found = [p for p in fs.ls(path, detail=False) if _suffix(p) in known and not _hidden(p)]
        else:
            found = [path] if fs.exists(path) else [p for p in fs.glob(path) if not _hidden(p)]
    except ImportError as error:
        raise ConfigError(f"images: {source}: {error}; pip install 'rlfseg[s3]' brings what s3:// needs") from error
    except Exception as error:  # each file system raises its own library's errors
        raise DataError(f"images: {source} can't be listed: {error}") from error
    local = "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
    return sorted(found if local else map(fs.unstrip_protocol, found))


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _hidden(path: str) -> bool:
    return _name(path).startswith(".")


def _suffix(path: str) -> str:
    return os.path.splitext(_name(path))[1].lower()


def _kind(path: str) -> str:
    suffix = _suffix(path)
    return "HDF5 files" if suffix in HDF5 else "Parquet files" if suffix in PARQUET else "pictures"


def _bytes(url: str) -> bytes:
    try:
        with fsspec.open(url) as file:
            return bytes(file.read())
    except (FileNotFoundError, PermissionError) as error:
        raise BadSample(f"can't be read: {str(error) or 'no such object, or not permitted'}", file=url) from error
    except Exception as error:  # of any library; the network's fault isn't the picture's
        raise DataError(f"{url} can't be read: {error}; start again, it goes on from here") from error


# --- pictures --------------------------------------------------------------------------------------------------------


def read_file(row: Row, *, pixels: int = images.MAX_PIXELS) -> Asked:
    """Decodes the picture at the path or URL that is the row's id.

    Args:
        row: `id`, `captions`.
        pixels: Largest height times width.

    Returns:
        Picture and phrases.

    Raises:
        BadSample: It is missing, too large, or can't be decoded.
        DataError: Its server can't be reached.
    """
    place = row["id"]
    source = _bytes(place) if "://" in place else place
    return images.load_image(source, name=place, max_pixels=pixels), row["captions"]


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _parquet_rows(file: str, column: str, *, needed: bool) -> Iterator[Row]:
    """Pictures with their own phrases; `group` and `row` tell where its bytes lie, without them the id is a path."""
    try:
        with fsspec.open(file) as opened:
            parquet = pq.ParquetFile(opened)
            names = parquet.schema_arrow.names
            if not {"image", "path"} & set(names) or (needed and column not in names):
                also = f", and `{column}` since there are no `phrases`" if needed else ""
                raise DataError(f"images: {file}: needs `path` or `image`{also}; it has {', '.join(names)}")
            wanted = [name for name in ("path", column) if name in names]
            number = 0
            for group in range(parquet.num_row_groups):
                for n, row in enumerate(parquet.read_row_group(group, columns=wanted).to_pylist()):
                    captions = _phrases(row.get(column), f"{file}, row {number}")
                    if "image" in names:
                        yield {"id": f"{file}#{number}", "captions": captions, "file": file, "group": group, "row": n}
                    else:
                        yield {"id": _resolved(row["path"], file, number), "captions": captions}
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"images: {file}: not a whole Parquet file ({error})") from error


def _phrases(value: Any, where: str) -> list[str]:
    try:
        return [checked_phrase(p or "") for p in ([value] if isinstance(value, str) else value or ())]
    except (BadSample, TypeError, AttributeError) as error:
        raise DataError(f"images: {where}: {getattr(error, 'reason', f'{value!a:.40} is no phrase')}") from error


def _resolved(path: Any, file: str, number: int) -> str:
    """A path is relative to the file that names it."""
    if not isinstance(path, str) or not path or "\0" in path:
        raise DataError(f"images: {file}, row {number}: {path!a} is no path")
    return path if "://" in path or os.path.isabs(path) else f"{file.rpartition('/')[0]}/{path}"


def _merged(rows: Iterable[Row]) -> list[Row]:
    """A row a picture: lists of referring expressions have a row a phrase."""
    merged: dict[str, Row] = {}
    for row in rows:
        merged.setdefault(row["id"], row | {"captions": []})["captions"].extend(row["captions"])
    return list(merged.values())


@lru_cache(maxsize=1)  # the pictures of a row group are asked for one after the other
def _embedded(file: str, group: int) -> pa.ChunkedArray:
    with fsspec.open(file) as opened:
        return pq.ParquetFile(opened).read_row_group(group, columns=["image"])["image"]


def read_embedded(row: Row, *, pixels: int) -> Asked:
    """Decodes the picture whose file lies in a Parquet file, as bytes or as `{bytes, path}`.

    Args:
        row: `id`, `captions`, `file`, `group`, `row`.
        pixels: Largest height times width.

    Returns:
        Picture and phrases.

    Raises:
        BadSample: There are no bytes, they are too large a picture, or can't be decoded.
    """
    try:
        value = _embedded(row["file"], row["group"])[row["row"]].as_py()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadSample(f"its row group is damaged ({error})", file=row["id"]) from error
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise BadSample("its `image` holds no bytes", file=row["id"])
    return images.load_image(data, name=row["id"], max_pixels=pixels), row["captions"]


# --- HDF5 ------------------------------------------------------------------------------------------------------------


def _hdf5_rows(files: list[str]) -> list[Row]:
    """A row a sample, `bad` where it can't be read; read in a child process first, since the files are anybody's."""
    remote = next((file for file in files if "://" in file), None)
    if remote is not None:
        raise ConfigError(f"images: {remote}: HDF5 is read from local or mounted folders only; copy it first")
    rows: list[Row] = []
    for seen in hdf5.preflight(files):
        if isinstance(seen, BadSample) and seen.sample is None:
            raise seen
        rows.append(
            {"id": seen.sample, "shard": seen.file, "bad": seen.reason}
            if isinstance(seen, BadSample)
            else {"id": seen.id, "shard": seen.file, "bad": None}
        )
    return rows


class OfShards:
    """Reads pictures of HDF5 files.

    Args:
        folder: Where the shards' names start from.
        phrases: To ask; empty: the picture's own captions.
    """

    def __init__(self, folder: Path, phrases: list[str]):
        self.reader, self.phrases = hdf5.Reader(folder), phrases

    def __call__(self, row: Row) -> Asked:
        """Reads one picture.

        Args:
            row: `id`, `shard`, and `bad` where a look at it has failed.

        Returns:
            Picture and phrases.

        Raises:
            BadSample: It is damaged, or a caption of it is empty.
        """
        if row.get("bad"):
            raise BadSample(row["bad"], file=row["shard"], sample=row["id"])
        image = self.reader.image(row["shard"], row["id"])
        captions = self.phrases or self.reader.captions(row["shard"], row["id"])
        try:
            return image, [checked_phrase(c) for c in captions]
        except BadSample as error:
            raise BadSample(error.reason, file=row["shard"], sample=row["id"]) from error
