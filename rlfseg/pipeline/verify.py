"""Verify: everything in a file or folder is read; the first damage ends it, with the file and the sample in the error.

What carries a checksum is compared with it: samples with their digests, Parquet pages with theirs. All is decoded and
must make sense: masks of their picture's size, latents of their shape and finite, weights finite, an index that says
what its shards hold, counts that are those of `_SUCCESS.json`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from rlfseg import adapter, hdf5, images
from rlfseg.config import VerifyConfig
from rlfseg.datasets import coco, folder, lists, records, refer
from rlfseg.errors import BadSample, ConfigError, DataError, ModelError
from rlfseg.hdf5 import Seen
from rlfseg.pipeline.folders import STARTED, require_finished
from rlfseg.pipeline.prepare import PHRASES
from rlfseg.pipeline.rows import OK, Row
from rlfseg.pipeline.stages import Summary

LISTS = (".jsonl", ".csv")
KNOWN = {  # the columns of refine, encode, predict and evaluate that are looked into
    **dict.fromkeys(("id", "status"), pa.string()),
    **dict.fromkeys(("height", "width"), pa.int32()),
    **dict.fromkeys(("captions", "masks", "outcomes"), pa.list_(pa.string())),
    "areas": pa.list_(pa.int64()),
    "shape": pa.list_(pa.int32()),
    "z1": pa.binary(),
    **dict.fromkeys(("z0", "z0_refined"), pa.list_(pa.binary())),
}


def run(config: VerifyConfig) -> Summary:
    """Reads all that `config.files` names.

    Args:
        config: Settings of the command.

    Returns:
        How many samples, rows and files were read.

    Raises:
        BadSample: A sample is damaged.
        ConfigError: Something that can't be verified.
        DataError: A file or folder is damaged or unfinished.
        ModelError: An adapter is damaged.
    """
    start = time.monotonic()
    read = {file: verified(Path(file)) for file in config.files}
    total = sum(read.values())
    return Summary(
        name="verify",
        out="all of it is whole",
        rows_in=total,
        rows_out=total,
        refused={},
        seconds=time.monotonic() - start,
        figures=dict(read),
    )


def verified(path: Path) -> int:
    """Reads one file or folder.

    Args:
        path: What a user named.

    Returns:
        Samples, rows or files in it.

    Raises:
        ConfigError: No kind of file that can be verified.
        DataError: Damaged; BadSample where the sample is known, ModelError where it is an adapter.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        return _folder(path)
    if suffix in hdf5.SUFFIXES:
        return len(_samples([path]))
    if suffix == ".parquet":
        return sum(1 for _ in _rows(path))
    if suffix == ".safetensors":
        return _weights(path)
    if suffix in LISTS:
        return _listed(path)
    if suffix == ".json":
        return _json(path)
    if suffix == ".p":
        return len(refer.read_refs(path))
    if suffix in images.SUFFIXES:
        images.load_image(path, name=str(path))
        return 1
    raise ConfigError(
        f"files: {path}: {'no kind of file that is known' if path.exists() else 'no such file'}; give HDF5, Parquet, "
        "safetensors, pictures, annotations (.json, .jsonl, .csv, .p), or a folder that a command wrote"
    )


def _folder(path: Path) -> int:
    done = require_finished(path) if (path / STARTED).exists() else {}
    parts = [_adapter(p) for p in (path, path / "adapter") if (p / adapter.CARD).is_file()]
    if (path / hdf5.INDEX).is_file():
        parts.append(_indexed(path, done))
    elif shards := hdf5.list_shards(path):
        parts.append(len(_samples(shards)))
    if files := sorted((path / "data").glob("*.parquet")):
        status = _statuses(path, files)
        if done.get("rows_in") != len(status) and not (path / hdf5.INDEX).is_file():
            raise DataError(f"{path}: holds {len(status)} rows, _SUCCESS.json says {done.get('rows_in')}")
        parts.append(len(status))
    if not parts and not done:
        raise ConfigError(
            f"files: {path} holds nothing that can be verified: no shards, no adapter, no command's output"
        )
    return sum(parts)


def _listed(path: Path) -> int:
    """A list of phrases, with its pictures and masks."""
    plan = folder.plan(path)
    for record in plan.records:
        records.load(record, plan.rule)
    return len(plan.records)


def _json(path: Path) -> int:
    """Objects of a JSON file, each looked into where its form is known."""
    if lists.read_text(path).lstrip()[:1] == "[":
        return sum(1 for _ in lists.read_items(path))
    tree = lists.read_json(path)
    if isinstance(tree, dict) and "annotations" in tree:
        return coco.check(path)
    return _listed(path) if path.name in folder.LISTS or (isinstance(tree, dict) and "images" in tree) else 1


# --- samples ---------------------------------------------------------------------------------------------------------


def _samples(shards: list[Path]) -> dict[str, Seen]:
    """Every sample of some shards by its id."""
    found: dict[str, Seen] = {}
    for seen in hdf5.preflight(shards):
        if isinstance(seen, BadSample):
            raise seen
        if seen.id in found:
            raise BadSample(f"this id is in {found[seen.id].file} too", file=seen.file, sample=seen.id)
        found[seen.id] = seen
    return found


def _indexed(path: Path, done: Row) -> int:
    """A folder of `prepare`: the index against the shards and against what was counted when it was finished."""
    rows = hdf5.read_index(path).to_pylist()
    if (written := done.get("rows_out", len(rows))) != len(rows):
        raise DataError(f"{path / hdf5.INDEX}: holds {len(rows)} samples, _SUCCESS.json says {written}")
    phrases = path / PHRASES
    if (listed := done.get("phrase_rows")) is not None and listed != (found := sum(1 for _ in _rows(phrases))):
        raise DataError(f"{phrases}: holds {found} rows, _SUCCESS.json says {listed}")
    samples = _samples(sorted({path / row["shard"] for row in rows} | set(hdf5.list_shards(path))))
    for row in rows:
        seen = samples.pop(row["id"], None)
        said = (str(path / row["shard"]), row["height"], row["width"], row["captions"])
        if seen is None or said != (seen.file, *seen.size, list(seen.captions)):
            reason = f"{hdf5.INDEX} says other things of this sample than its shard; run `prepare` again"
            raise BadSample(reason, file=str(path / row["shard"]), sample=row["id"])
    if samples:
        stray = next(iter(samples.values()))
        raise BadSample(f"this sample is not in {hdf5.INDEX}", file=stray.file, sample=stray.id)
    return len(rows)


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _statuses(path: Path, files: list[Path]) -> dict[str, str]:
    status: dict[str, str] = {}
    for file in files:
        for row in _rows(file):
            if row["id"] in status:
                raise BadSample("this id was written twice", file=str(file), sample=row["id"])
            status[row["id"]] = row["status"]
    return status


def _rows(path: Path) -> Iterator[Row]:
    """Every row of a file, checked by the columns that it has."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check_types(path, file.schema_arrow)
            for group in range(file.num_row_groups):
                for row in _whole(file.read_row_group(group), file.metadata.row_group(group).num_rows):
                    if row.get("status", OK) == OK and (wrong := _wrong(row)):
                        raise BadSample(wrong, file=str(path), sample=str(row.get("id")))
                    yield row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: damaged ({error})") from error


def _whole(table: pa.Table, rows: int) -> Iterator[Row]:
    """Its rows, if they are as many as the file declares and all texts are UTF-8; else ArrowInvalid."""
    table.validate(full=True)
    if table.num_rows != rows:
        raise pa.ArrowInvalid(f"{table.num_rows} rows, {rows} are declared")
    for batch in table.to_batches(max_chunksize=64):
        yield from batch.to_pylist()


def _check_types(path: Path, schema: pa.Schema) -> None:
    for name, wanted in KNOWN.items():
        found = schema.field(name).type if name in schema.names else wanted
        if found != wanted:
            raise DataError(f"{path}: the column {name} must be {wanted}, this is {found}")


def _wrong(row: Row) -> str | None:
    """What makes no sense in a row of refine, encode, predict or evaluate."""
    phrases = len(row.get("captions") or ())
    of_phrases = {k: row[k] for k in ("masks", "outcomes", "areas", "z0", "z0_refined") if row.get(k) is not None}
    if short := [k for k, values in of_phrases.items() if len(values) != phrases]:
        return f"{short[0]} holds {len(of_phrases[short[0]])} values for {phrases} phrases"
    masks = (of_phrases.get("masks") or ()) if row.get("height") and row.get("width") else ()
    areas = of_phrases.get("areas") or [None] * phrases
    for counts, area in zip(masks, areas, strict=False):
        if counts is not None and (wrong := _wrong_mask(counts, (row["height"], row["width"]), area)):
            return wrong
    latents = [row.get("z1"), *of_phrases.get("z0", ()), *of_phrases.get("z0_refined", ())]
    return next((wrong for z in latents if z is not None and (wrong := _wrong_latent(z, row.get("shape")))), None)


def _wrong_mask(counts: str, size: tuple[int, int], area: int | None) -> str | None:
    try:
        mask = images.rle_decode(counts, size)
    except DataError as error:
        return str(error)
    found = int(mask.sum())
    return None if area in (None, found) else f"a mask has {found} pixels, its row says {area}"


def _wrong_latent(data: bytes, shape: list[int] | None) -> str | None:
    if len(data) != 2 * math.prod(shape or [0]):
        return f"a latent has {len(data)} bytes, its shape is {shape}"
    return None if np.isfinite(np.frombuffer(data, np.float16)).all() else "a latent holds NaN or infinity"


# --- adapters --------------------------------------------------------------------------------------------------------


def _adapter(path: Path) -> int:
    card = adapter.read_card(path)
    weights = path / ("unet" if card.full else ".")
    files = sorted(weights.glob("*.safetensors"))
    if not files or not list(weights.glob("*config.json")):
        raise ModelError(f"{path}: has no weights in safetensors with their config.json in {weights}")
    return sum(map(_weights, files))


def _weights(path: Path) -> int:
    """Tensors in a file of weights, all finite."""
    from safetensors.torch import load_file  # not NumPy's: that has no bfloat16

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{path}: damaged ({error})") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ModelError(f"{path}: {name} holds NaN or infinity")
    return len(tensors)
