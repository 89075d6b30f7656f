"""Bytes of pictures that are no local files: at a URL, or among others in a Parquet file.

What can't be read is either the picture's own fault, which a job reports and passes by, or that of a disk, a server or
keys, which says nothing about the picture: then the job ends, and goes on from there when it is started again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from rlfseg.errors import BadSample, DataError
from rlfseg.images import OF_ITS_NAME

# In S3's words; keys that expired or are of no use are no fault of the object
FORBIDDEN = ("AccessDenied", "InvalidObjectState")
AT_ONCE = 16  # pictures of a row group that are in memory as values
BUFFER = 1 << 20  # bytes


def of_url(url: str) -> bytes:
    """What lies at a URL.

    Args:
        url: Any that fsspec knows.

    Returns:
        All of it.

    Raises:
        BadSample: There is no such object, or this one is forbidden.
        DataError: Its server can't be reached, or doesn't take these keys.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url)
        # Else s3fs asks for the size first, and the answer to a HEAD doesn't say why it is refused
        return bytes(fs.cat_file(path, **({"max_concurrency": 1} if "s3" in fs.protocol else {})))
    except Exception as error:  # of any library
        if not _of_the_object(error):
            raise outage(url, error) from error
        raise BadSample(f"can't be read: {str(error) or 'no such object, or not permitted'}", file=url) from error


def of_group(file: str, group: int, row: int, version: tuple[Any, ...] = ()) -> Any:
    """A value of the column `image`; quick for rows that are asked for in order, in bounded memory for any.

    Args:
        file: Path or URL of a Parquet file.
        group: Number of a row group.
        row: Number in it.
        version: What changes when the file does.

    Returns:
        The value, as Python has it.

    Raises:
        BadSample: The row group is damaged, there or before.
        DataError: The file can't be read.
    """
    try:
        return _group(file, group, version).value(row)
    except Exception as error:  # of any library
        if damaged(error):
            raise BadSample(
                f"its row group is damaged ({error})", file=f"{file}, row {row} of group {group}"
            ) from error
        _group.cache_clear()  # it may be whole next time
        raise outage(file, error) from error


def damaged(error: Exception) -> bool:
    """Whether Arrow says so of a Parquet file's bytes: a disk's errors have numbers, a server's other classes."""
    return isinstance(error, pa.ArrowException | UnicodeDecodeError) or (type(error) is OSError and error.errno is None)


def outage(place: str, error: Exception) -> DataError:
    """What to say where a disk, a server or keys fail."""
    return DataError(f"{place} can't be read: {str(error) or type(error).__name__}; start again, it goes on from here")


def _of_the_object(error: Exception) -> bool:
    answer = getattr(error.__cause__, "response", None)  # botocore's; s3fs says PermissionError of any keys
    code = answer.get("Error", {}).get("Code") if isinstance(answer, dict) else None
    known = isinstance(error, FileNotFoundError) or getattr(error, "errno", None) in OF_ITS_NAME
    return known or code in FORBIDDEN


class _Group:
    """Goes forward through a row group; a row that it has passed makes it start again."""

    def __init__(self, file: str, group: int):
        self.file, self.group, self.first = file, group, 0
        self.batches, self.values = _read(self.file, self.group), pa.array([], pa.binary())

    def value(self, row: int) -> Any:
        """Of the row with this number, as Python has it; ArrowInvalid where the group ends or is damaged before it."""
        if row < self.first:
            self.first, self.batches, self.values = 0, _read(self.file, self.group), self.values[:0]
        while row >= self.first + len(self.values):
            # Where an error has ended it there is nothing more, and so no second way up to there for each row behind
            values = next(self.batches, None)
            if values is None:
                raise pa.ArrowInvalid("it ends, or is damaged, before this row")
            self.first, self.values = self.first + len(self.values), values
        return self.values[row - self.first].as_py()


def _read(file: str, group: int) -> Iterator[pa.Array]:
    """No method, which would hold its object, and what it has loaded, until the garbage is collected."""
    with fsspec.open(file) as opened:
        # Both settings, or Arrow loads the whole column of the row group
        parquet = pq.ParquetFile(opened, pre_buffer=False, buffer_size=BUFFER)
        for batch in parquet.iter_batches(AT_ONCE, row_groups=[group], columns=["image"]):
            yield batch["image"]


@lru_cache(maxsize=1)  # the pictures of a row group are asked for one after the other, by many tasks of a process
def _group(file: str, group: int, version: tuple[Any, ...]) -> _Group:
    return _Group(file, group)
