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
from contextlib import contextmanager
from dataclasses import dataclass
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
from rlfseg.pipeline import fetch
from rlfseg.pipeline.folders import STARTED, not_shared, stamp
from rlfseg.pipeline.rows import Row
from rlfseg.pipeline.samples import open_samples
from rlfseg.results import checked_phrase

Asked = tuple[NDArray[np.uint8], list[str]]  # uint8 RGB [H, W, 3], and what to look for in it
Files = dict[str, tuple[Any, ...]]  # of each path or URL what changes when the file does
HDF5, PARQUET = hdf5.index.SUFFIXES, frozenset({".parquet"})
KNOWN = images.SUFFIXES | HDF5 | PARQUET
CHANGES = ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "updated")  # as file systems call it
INDEX = {
    **dict.fromkeys(("id", "bad", "shard", "file"), pa.string()),
    **dict.fromkeys(("group", "row"), pa.int64()),
    "captions": pa.list_(pa.string()),
}


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures to work on.

    Attributes:
        rows: Index, a row a picture: `id`, and whatever `read` needs; phrases only where they are the picture's own.
        read: Picklable, index row -> picture and phrases; raises BadSample.
        fingerprint: Changes with the ids and their phrases, and with the size or time of any file that was listed.
    """

    rows: pa.Table
    read: Callable[[Row], Asked]
    fingerprint: str


def find(
    source: str, phrases: list[str], column: str, *, pixels: int = images.MAX_PIXELS, but: Path | None = None
) -> Pictures:
    """Finds pictures without decoding any.

    Args:
        source: See the top of this file.
        phrases: To ask of every picture.
        column: Of Parquet files: text or lists of text, the phrases of each picture, asked before `phrases`.
        pixels: Largest height times width of a picture that is a file or bytes.
        but: Folder whose files are left out, where masks are drawn to.

    Returns:
        The pictures; one that has no phrases, or bad ones, is refused when it is read.

    Raises:
        BadSample: An HDF5 file can't be listed.
        ConfigError: There is no picture, several kinds of files, or no phrase for any picture.
        DataError: A Parquet file or a URL can't be read, or no row of it can be used.
    """
    if (Path(source) / STARTED).is_file():
        samples = open_samples(source)
        rows = samples.rows.select(["id", "shard"])
        return Pictures(rows=rows, read=OfShards(samples.folder, phrases), fingerprint=samples.fingerprint)
    files = {file: state for file, state in _files(source).items() if but is None or not file.startswith(f"{but}/")}
    kinds = {_kind(file) for file in files}
    if not files or len(kinds) > 1:
        told = f"holds {' and '.join(sorted(kinds))}: say which, by a glob" if files else "names no picture"
        raise ConfigError(
            f"images: {source} {told}; give a picture, a folder, a glob, Parquet, HDF5, or a folder of `prepare`"
        )
    if "pictures" in kinds:
        rows = [_picture(file) for file in files]
        if not phrases:
            raise ConfigError(_silent(rows[0]["id"]))
        return _made(files, rows, OfFiles(phrases, pixels, root=_root(rows)))
    odd = next((file for file in files if not _is_text(file)), None)
    if odd is not None:
        raise DataError(f"images: {odd!a}: its name isn't UTF-8; rename it")
    if "HDF5 files" in kinds:
        return _made(files, _hdf5_rows(list(files)), OfShards(Path("/"), phrases))
    rows = _listed(files, column, phrases)
    return _made(files, rows, OfFiles(phrases, pixels, versions=files, root=_root(rows)))


def _made(files: Files, rows: list[Row], read: OfFiles | OfShards) -> Pictures:
    told, seen = sha256(repr(read.phrases).encode()), set[str]()
    for mark in files.items():
        told.update(repr(mark).encode(errors="surrogatepass"))
    for row in rows:
        if row["id"] in seen:
            raise DataError(f"images: {row['id']} is there twice")
        seen.add(row["id"])
        told.update(repr((row["id"], row.get("captions"))).encode(errors="surrogatepass"))
    schema = pa.schema([(key, kind) for key, kind in INDEX.items() if any(key in row for row in rows)])
    return Pictures(rows=pa.Table.from_pylist(rows, schema=schema), read=read, fingerprint=told.hexdigest()[:12])


def _silent(first: str) -> str:
    return f"phrases: empty, and {first} brings none of its own; give e.g. --phrases '[\"red ring\"]'"


# --- which files -----------------------------------------------------------------------------------------------------


def _files(source: str) -> Files:
    """Absolute paths or URLs, sorted; of a folder, and of a glob without a suffix of its own, those of a known one."""
    try:
        fs, path = fsspec.core.url_to_fs(source)
        if fs.isdir(path):
            found, wanted = fs.ls(path, detail=True), KNOWN
        elif fs.exists(path):
            found, wanted = [fs.info(path)], frozenset({_suffix(path)})
        else:
            found, wanted = fs.glob(path, detail=True).values(), KNOWN | {_suffix(path)} - {""}
    except ImportError as error:
        fix = "`pip install -c constraints.txt '.[s3]'` in the checkout, on every node, brings what s3:// needs"
        raise ConfigError(f"images: {source}: {error}; {fix}") from error
    except Exception as error:  # each file system raises its own library's errors
        raise DataError(f"images: {source} can't be listed: {error}") from error
    local = "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
    files: Files = {}
    for info in sorted(found, key=lambda info: str(info["name"])):
        name = info["name"]
        if info["type"] == "directory" or _suffix(name) not in wanted or (_hidden(name) and name != path):
            continue
        if local:
            files[name] = stamp(name) or ()
        else:  # as the listing has it, without a request a file
            files[fs.unstrip_protocol(name)] = tuple(str(info[key]) for key in CHANGES if key in info)
    return files


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _root(rows: list[Row]) -> Path | None:
    """The folder that holds all pictures, which every node must see; None where some are elsewhere, or at a URL."""
    first, last = min(row["id"] for row in rows), max(row["id"] for row in rows)  # what they share, all in between do
    if "://" in first or "://" in last:
        return None
    root = Path(os.path.commonpath([os.path.dirname(first), os.path.dirname(last)]))
    return root if root != Path("/") and _holds_any(root) else None


@contextmanager
def _mounted(folder: Path | None) -> Iterator[None]:
    """A picture that can't be read on a node that doesn't see its folder is no bad one."""
    try:
        yield
    except BadSample as error:
        if folder and not _holds_any(folder):
            raise not_shared("images", str(folder)) from error
        raise


def _holds_any(folder: Path) -> bool:
    """Whether this node sees anything in a folder: where nothing is mounted, the place to mount it is empty."""
    try:
        with os.scandir(folder) as found:
            return next(found, None) is not None
    except OSError:
        return False


def _hidden(path: str) -> bool:
    return _name(path).startswith(".")


def _suffix(path: str) -> str:
    return os.path.splitext(_name(path))[1].lower()


def _kind(path: str) -> str:
    suffix = _suffix(path)
    return "HDF5 files" if suffix in HDF5 else "Parquet files" if suffix in PARQUET else "pictures"


def _is_text(path: str) -> bool:
    """Whether a file's name is UTF-8, as Arrow's text must be."""
    return path.encode(errors="ignore").decode() == path


# --- files -----------------------------------------------------------------------------------------------------------


def _picture(file: str) -> Row:
    bad = None if _is_text(file) else "its name isn't UTF-8; rename it"
    return {"id": file.encode(errors="backslashreplace").decode(), "bad": bad}


class OfFiles:
    """Reads pictures that are files, or lie in Parquet files as a file's bytes.

    Args:
        phrases: To ask of every picture, after its own.
        pixels: Largest height times width.
        versions: What changes when a Parquet file does.
        root: Folder that holds all pictures, where there is one.
    """

    def __init__(
        self,
        phrases: list[str],
        pixels: int = images.MAX_PIXELS,
        versions: Files | None = None,
        root: Path | None = None,
    ):
        self.phrases, self.pixels, self.versions, self.root = phrases, pixels, versions or {}, root

    def __call__(self, row: Row) -> Asked:
        """Decodes one picture.

        Args:
            row: `id`, which is its path or URL, or `file`, `group` and `row` of its bytes; `captions`, its own phrases;
                `bad`, where the list that names it is wrong.

        Returns:
            Picture and phrases.

        Raises:
            BadSample: It is missing, too large, or can't be decoded, or its row is bad.
            ConfigError: This node doesn't see the folder of the pictures.
            DataError: Its disk or server can't be read.
        """
        place = row["id"]
        if row.get("bad"):
            raise BadSample(row["bad"], file=place)
        source = place
        if row.get("file"):
            source = self._embedded(row)
        elif "://" in place:
            source = fetch.of_url(place)
        with _mounted(self.root):
            image = images.load_image(source, name=place, max_pixels=self.pixels)
        return image, [*(row.get("captions") or ()), *self.phrases]

    def _embedded(self, row: Row) -> bytes:
        """Its bytes, which lie there bare or as `{bytes, path}`."""
        try:
            value = fetch.of_group(row["file"], row["group"], row["row"], self.versions.get(row["file"], ()))
        except BadSample as error:
            raise BadSample(error.reason, file=row["id"]) from error
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise BadSample("its `image` holds no bytes", file=row["id"])
        return data


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _listed(files: Iterable[str], column: str, phrases: list[str]) -> list[Row]:
    """A row a picture; `bad` says what is wrong with its phrases or its path."""
    rows = _merged(row for file in files for row in _parquet_rows(file, column, needed=not phrases))
    if not rows:
        raise ConfigError(f"images: {next(iter(files))} has no rows")
    silent = [row for row in rows if not (phrases or row["captions"] or row["bad"])]
    if len(silent) == len(rows):
        raise ConfigError(_silent(rows[0]["id"]))
    for row in silent:
        row["bad"] = f"its `{column}` holds no phrase, and no `phrases` are given for all"
    if all(row["bad"] for row in rows):
        raise DataError(f"images: {rows[0]['id']}: {rows[0]['bad']}; no other row can be used either")
    return rows


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
                    captions, bad = _phrases(row.get(column), where := f"{_name(file)}, row {number}")
                    known = {"id": f"{file}#{number}", "captions": captions, "bad": bad}
                    if "image" in names:
                        yield known | {"file": file, "group": group, "row": n}
                    elif _is_path(row["path"]):
                        yield known | {"id": _resolved(row["path"], file)}
                    else:
                        yield known | {"bad": f"{where}: {row['path']!a:.40} is no path"}
                    number += 1
    except DataError:
        raise
    except Exception as error:  # of any library
        if fetch.damaged(error):
            raise DataError(f"images: {file}: not a whole Parquet file ({error})") from error
        raise fetch.outage(f"images: {file}", error) from error


def _phrases(value: Any, where: str) -> tuple[list[str], str | None]:
    """A row's own phrases, and what is wrong with them."""
    try:
        return [checked_phrase(p or "") for p in ([value] if isinstance(value, str) else value or ())], None
    except (BadSample, TypeError, AttributeError) as error:
        return [], f"{where}: {getattr(error, 'reason', f'{value!a:.40} is no phrase')}"


def _is_path(path: Any) -> bool:
    return isinstance(path, str) and bool(path) and "\0" not in path


def _resolved(path: str, file: str) -> str:
    """A path is relative to the file that names it."""
    return path if "://" in path or os.path.isabs(path) else f"{file.rpartition('/')[0]}/{path}"


def _merged(rows: Iterable[Row]) -> list[Row]:
    """A row a picture: lists of referring expressions have a row a phrase."""
    merged: dict[str, Row] = {}
    for row in rows:
        first = merged.setdefault(row["id"], row | {"captions": []})
        first["captions"].extend(row["captions"])
        first["bad"] = first["bad"] or row["bad"]
    return list(merged.values())


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
            ConfigError: This node doesn't see its file's folder.
        """
        if row.get("bad"):
            raise BadSample(row["bad"], file=row["shard"], sample=row["id"])
        with _mounted((self.reader.folder / row["shard"]).parent):
            image = self.reader.image(row["shard"], row["id"])
        captions = self.phrases or self.reader.captions(row["shard"], row["id"])
        try:
            return image, [checked_phrase(c) for c in captions]
        except BadSample as error:
            raise BadSample(error.reason, file=row["shard"], sample=row["id"]) from error
