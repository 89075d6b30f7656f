"""Which pictures a batch asks for: every path is resolved and must lie under one of the configured roots."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rlfseg.config import ServeConfig
from serve.incoming import phrase_fault
from serve.refusal import Refusal
from serve.schema import BatchRequest

COLUMNS = ("path", "phrases")
MOST_BYTES = 2**28  # of all texts: a million pictures with a few phrases each
MOST_LINE = 1_000_000  # bytes of a line of JSONL
ROWS = 1024  # of Parquet that are decoded at a time


def read_manifest(asked: BatchRequest, config: ServeConfig) -> pa.Table:
    """What a batch is to do, as `predict` reads it.

    Args:
        asked: A manifest, or paths.
        config: Roots and limits.

    Returns:
        Columns `path` (absolute, each once) and `phrases`.

    Raises:
        Refusal: A path outside the roots, a manifest that can't be read, a picture without phrases, or too much.
    """
    roots = [Path(root).resolve() for root in config.batches.roots]
    if bool(asked.manifest) == bool(asked.images):
        raise Refusal("invalid", "give either `manifest` or `images`")
    if asked.manifest:
        file = _inside(asked.manifest, roots[0], roots, "manifest")
        rows: Iterable[tuple[Any, Any]] = _rows(file, asked.manifest, config)
        base = file.parent
    else:
        rows, base = ((path, []) for path in asked.images), roots[0]
    table: dict[str, dict[str, None]] = {}  # a picture named twice is one picture with all its phrases
    for n, (path, phrases) in enumerate(rows):
        where = f"{'manifest' if asked.manifest else 'images'}[{n}]"
        if n >= config.batches.images:
            raise Refusal("too_large", f"{where}: a batch may have {config.batches.images} pictures")
        if not isinstance(path, str) or not _are_texts(phrases):
            raise Refusal("invalid", f"{where}: needs `path`, a text, and `phrases`, a list of texts")
        own = table.setdefault(str(_inside(path, base, roots, where)), {})
        own |= dict.fromkeys(_checked([*phrases, *asked.phrases], config, where))
    if not table:
        raise Refusal("invalid", "manifest: it names no picture")
    return pa.table({"path": list(table), "phrases": [list(own) for own in table.values()]})


def _inside(path: str, base: Path, roots: list[Path], where: str) -> Path:
    try:
        full = (base / path).resolve()  # follows links: one that leads out is outside
    except (OSError, ValueError, RuntimeError):  # too long, with NUL, or links in a circle
        full = Path("/")
    if not any(full.is_relative_to(root) and full != root for root in roots):
        raise Refusal("invalid", f"{where}: {path[:200]!r} lies outside the folders that batches may read")
    return full


def _rows(file: Path, name: str, config: ServeConfig) -> Iterator[tuple[Any, Any]]:
    try:
        if not file.is_file():  # a pipe would be waited for
            raise FileNotFoundError
        yield from _parquet(file, config) if file.suffix.lower() == ".parquet" else _jsonl(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, pa.ArrowException) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"can't be read: {type(error).__name__}"
        fix = "give Parquet or JSONL with `path` and `phrases`"
        raise Refusal("invalid", f"manifest: {name[:200]!r}: {reason}; {fix}") from None


def _jsonl(file: Path) -> Iterator[tuple[Any, Any]]:
    _check_size(file.stat().st_size)
    with file.open("rb") as lines:
        while line := lines.readline(MOST_LINE):
            if line.strip():
                row = json.loads(line)
                yield row["path"], row.get("phrases", [])


def _parquet(file: Path, config: ServeConfig) -> Iterator[tuple[Any, Any]]:
    """Texts stay in their dictionaries until their lengths are added up: a kilobyte may stand for gigabytes."""
    metadata = pq.read_metadata(file)
    rows, groups = metadata.num_rows, range(metadata.num_row_groups)
    if rows > config.batches.images:
        raise Refusal("too_large", f"manifest: a batch may have {config.batches.images} pictures")
    names = [metadata.schema.column(n).path for n in range(metadata.num_columns)]
    leaves = {n: name for n, name in enumerate(names) if name.partition(".")[0] in COLUMNS}
    chunks = [metadata.row_group(group).column(n) for group in groups for n in leaves]
    _check_size(sum(chunk.total_uncompressed_size for chunk in chunks))
    if sum(chunk.num_values for chunk in chunks) > rows * (1 + config.limits.phrases):
        raise Refusal("invalid", f"manifest: a picture has more than {config.limits.phrases} phrases")
    parquet = pq.ParquetFile(file, metadata=metadata, read_dictionary=list(leaves.values()))
    size = 0
    for batch in parquet.iter_batches(batch_size=ROWS, columns=list(COLUMNS)):
        size += sum(map(_characters, batch.columns))
        _check_size(size)
        for row in batch.to_pylist():
            yield row["path"], row.get("phrases") or []


def _characters(column: pa.Array) -> int:
    """Bytes of a column's texts, or of the texts in its lists; raises TypeError where it holds anything else."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = column.flatten()
    if pa.types.is_null(column.type):
        return 0
    if not pa.types.is_dictionary(column.type):
        raise TypeError
    lengths = pc.binary_length(column.dictionary)
    return pc.sum(lengths.take(column.indices)).as_py() or 0


def _check_size(size: int) -> None:
    if size > MOST_BYTES:
        raise Refusal("too_large", f"manifest: {size} bytes are more than {MOST_BYTES}; ask for several batches")


def _are_texts(phrases: Any) -> bool:
    return isinstance(phrases, list) and all(isinstance(p, str) for p in phrases)


def _checked(phrases: list[str], config: ServeConfig, where: str) -> list[str]:
    limits = config.limits
    faults = [phrase_fault(p, limits) for p in phrases]
    if not phrases or any(faults):
        raise Refusal("invalid", f"{where}: {next(filter(None, faults), 'no phrases; give some in `phrases`')}")
    if len(phrases) > limits.phrases:
        raise Refusal("invalid", f"{where}: {len(phrases)} phrases are more than {limits.phrases}")
    return [p.strip() for p in phrases]
