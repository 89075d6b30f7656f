"""What is trained on: latents that `encode` has cached, or the samples themselves, encoded in the training loop.

Both number the same samples in the same order, that of a hash of their ids, so that a plan means the same in both.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlfseg.backbone import Backbone, count_cut
from rlfseg.config import TrainConfig
from rlfseg.errors import ConfigError, DataError
from rlfseg.hdf5 import id_hash
from rlfseg.hub import resolve_base
from rlfseg.images import image_to_tensor, mask_to_tensor
from rlfseg.pipeline.encode import from_bytes, refined_masks
from rlfseg.pipeline.folders import fingerprint, identity_of, read_table, require_finished, weights
from rlfseg.pipeline.rows import OK, Row
from rlfseg.pipeline.samples import LoadSample, askable, open_samples
from rlfseg.training import Batch

Phrase = Sequence[int]  # number of the sample, number of the phrase in it
Place = tuple[str, int, int]  # file, row, phrase
BLOCK_BYTES = 64 * 2**20  # of the phrases that a reader yields at a time
LATENTS = pa.schema(
    [("id", pa.string()), ("caption", pa.string()), ("shape", pa.list_(pa.int32()))]
    + [(n, pa.binary()) for n in ("z1", "z0", "z0_refined")]
)
PIXELS = pa.schema(
    [("id", pa.string()), ("caption", pa.string())] + [(n, pa.binary()) for n in ("image", "mask", "refined")]
)


class Source(Protocol):
    """Phrases that are read by number.

    Attributes:
        captions: Of each sample; those that are empty can't be learnt from and are passed over.
        counts: Phrases of each sample that are not empty, int64 [n].
        has_refined: Whether any phrase has a refined label.
        phrase_bytes: Size of a phrase's row on its way.
        by_file: Whether samples lie in files, of which one reader best reads what lies together.
        fingerprint: Changes when the data does.
    """

    captions: list[list[str]]
    counts: NDArray[np.int64]
    has_refined: bool
    phrase_bytes: int
    by_file: bool
    fingerprint: str

    def reader(self, phrases: Sequence[Phrase]) -> Callable[[], Iterator[pa.Table]]:
        """A picklable function that reads these phrases, a row each, in this order, in another process."""
        ...

    def batch(self, table: pa.Table, backbone: Backbone) -> Batch:
        """Such rows as what a training step takes, in the training process."""
        ...


def open_source(config: TrainConfig) -> Source:
    """Opens the folder that the config names; reads ids and captions, no latent and no pixel.

    Args:
        config: Settings of the training.

    Returns:
        Cached latents, or samples to be encoded in the loop.

    Raises:
        ConfigError: Both or neither is given, or the latents are of another base, its weights, or resolution.
        DataError: The folder is unfinished or holds no phrase.
    """
    if config.latents and config.samples:
        raise ConfigError(f"samples: {config.samples} is given and latents: {config.latents} too; give one of them")
    if config.latents:
        return Latents(Path(config.latents).absolute(), config)
    if config.samples:
        return Pixels(Path(config.samples).absolute(), config.backbone.resolution)
    raise ConfigError("latents: a folder written by `encode` is needed, or samples: one of `prepare` or `refine`")


class Latents:
    """A folder of `encode`: nothing is left to do but to read.

    Args:
        folder: Written by `encode`.
        config: What must fit it.
    """

    by_file = True

    def __init__(self, folder: Path, config: TrainConfig):
        encoded = identity_of(require_finished(folder), folder).get("backbone")
        if not isinstance(encoded, dict):
            raise ConfigError(
                f"latents: {folder} was not written by `encode`; give such a folder, or this as `samples`"
            )
        for field in ("base", "resolution"):
            if encoded[field] != (wanted := getattr(config.backbone, field)):
                raise ConfigError(
                    f"backbone.{field}: {wanted}, but {folder} was encoded with {encoded[field]}; use the same"
                )
        if encoded.get("weights") != weights(resolve_base(config.backbone.base) / "vae"):
            raise ConfigError(
                f"backbone.base: the autoencoder of {config.backbone.base} has other weights than when {folder} was "
                "encoded; encode again"
            )
        found: list[tuple[str, str, int, list[str]]] = []
        shape: list[int] = []
        self.has_refined = False
        for path in sorted((folder / "data").glob("*.parquet")):
            table = read_table(path, ["id", "status", "shape", "captions"])
            ids, captions = table["id"].to_pylist(), table["captions"].to_pylist()
            rows = [n for n, state in enumerate(table["status"].to_pylist()) if state == OK]
            found += [(id_hash(ids[n]), str(path), n, captions[n]) for n in rows]
            shape = shape or (table["shape"][rows[0]].as_py() if rows else [])
            self.has_refined = self.has_refined or _holds_any(path, "z0_refined")
        found.sort()
        self.places = [(path, row) for _, path, row, _ in found]
        self.captions = [captions for *_, captions in found]
        self.askable, self.counts = _askable(self.captions)
        self.phrase_bytes = 3 * 2 * int(np.prod(shape))
        self.fingerprint = fingerprint(folder)
        _require_phrases(self.counts, folder)

    def reader(self, phrases: Sequence[Phrase]) -> Callable[[], Iterator[pa.Table]]:
        """Columns of LATENTS, as float16; reads every row group that it needs once and holds them all."""
        places = [(*self.places[n], self.askable[n][k]) for n, k in phrases]
        return partial(_read_latents, places, max(1, BLOCK_BYTES // self.phrase_bytes))

    def batch(self, table: pa.Table, backbone: Backbone) -> Batch:
        """Latents as they are cached."""
        c = table.to_pydict()
        shape = c["shape"][0]
        refined = [z if r is None else r for z, r in zip(c["z0"], c["z0_refined"], strict=True)]
        return Batch(
            ids=c["id"],
            phrases=c["caption"],
            z1=from_bytes(c["z1"], shape),
            z0=from_bytes(c["z0"], shape),
            z0_refined=from_bytes(refined, shape),
            has_refined=torch.tensor([r is not None for r in c["z0_refined"]]),
        )


def _holds_any(path: Path, column: str) -> bool:
    """Whether a column of lists holds anything but nulls: by the file's own statistics, without reading it."""
    file = pq.read_metadata(path)
    for group in map(file.row_group, range(file.num_row_groups)):
        leaf = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema.startswith(f"{column}."))
        if leaf.statistics is None or leaf.statistics.null_count < leaf.num_values:
            return True
    return False


def _read_latents(places: Sequence[Place], block: int) -> Iterator[pa.Table]:
    columns = ["id", "captions", "shape", "z1", "z0", "z0_refined"]
    wanted: dict[str, set[int]] = {}
    for path, n, _ in places:
        wanted.setdefault(path, set()).add(n)
    files = {path: _read_rows(path, wanted[path], columns) for path in sorted(wanted)}

    def row(path: str, n: int, k: int) -> Row:
        table, at = files[path]
        sample = {name: table[name][at[n]] for name in columns}
        of_phrase = {"caption": sample["captions"][k], **{name: sample[name][k] for name in ("z0", "z0_refined")}}
        values = {"shape": sample["shape"], "z1": sample["z1"], **of_phrase}
        return {"id": f"{sample['id']}#{k}"} | {name: value.as_py() for name, value in values.items()}

    for n in range(0, len(places), block):
        yield pa.Table.from_pylist([row(*place) for place in places[n : n + block]], schema=LATENTS)


def _read_rows(path: str, rows: set[int], columns: list[str]) -> tuple[pa.Table, dict[int, int]]:
    """The row groups that hold these rows of a file, and where in them each row is."""
    with pq.ParquetFile(path) as file:
        sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        starts = [0, *accumulate(sizes)]
        groups = sorted({bisect_right(starts, row) - 1 for row in rows})
        table = file.read_row_groups(groups, columns=columns)
    there = [row for n in groups for row in range(starts[n], starts[n + 1])]
    return table, {row: n for n, row in enumerate(there)}


class Pixels:
    """A folder of `prepare` or `refine`: pixels are read and resized on CPUs, and encoded by the training process.

    Args:
        folder: Written by `prepare` or `refine`.
        resolution: Side in pixels.
    """

    by_file = False

    def __init__(self, folder: Path, resolution: int):
        samples = open_samples(folder)
        hashes = [id_hash(i) for i in samples.rows["id"].to_pylist()]
        self.rows = samples.rows.take(sorted(range(len(hashes)), key=hashes.__getitem__))
        self.captions = self.rows["captions"].to_pylist()
        self.askable, self.counts = _askable(self.captions)
        outcomes = self.rows["outcomes"].to_pylist() if "outcomes" in self.rows.column_names else []
        self.has_refined = any("refined" in own for own in outcomes)
        self.phrase_bytes = (3 * 4 + 2) * resolution**2
        self.fingerprint = samples.fingerprint
        self.load, self.resolution = LoadSample(samples.folder), resolution
        _require_phrases(self.counts, folder)

    def reader(self, phrases: Sequence[Phrase]) -> Callable[[], Iterator[pa.Table]]:
        """Columns of PIXELS: image float32 [3, R, R], mask and refined uint8 [R, R], refined null where kept."""
        wanted = sorted({n for n, _ in phrases})
        rows = dict(zip(wanted, self.rows.take(wanted).to_pylist(), strict=True))
        return partial(_read_pixels, self.load, self.resolution, [(rows[n], self.askable[n][k]) for n, k in phrases])

    def batch(self, table: pa.Table, backbone: Backbone) -> Batch:
        """Encodes pictures and masks: what `encode` does, but not rounded to float16."""
        c = table.to_pydict()
        side = self.resolution
        image = torch.from_numpy(np.frombuffer(b"".join(c["image"]), np.float32).reshape(-1, 3, side, side).copy())
        has_refined = torch.tensor([m is not None for m in c["refined"]])
        z0 = backbone.encode(_masks(c["mask"], side))
        z0_refined = z0.clone()
        if has_refined.any():
            refined = backbone.encode(_masks([m for m in c["refined"] if m is not None], side))
            z0_refined[has_refined.to(z0.device)] = refined
        return Batch(
            ids=c["id"],
            phrases=c["caption"],
            z1=backbone.encode(image),
            z0=z0,
            z0_refined=z0_refined,
            has_refined=has_refined,
        )


def _read_pixels(load: LoadSample, side: int, phrases: Sequence[tuple[Row, int]]) -> Iterator[pa.Table]:
    loaded: dict[str, Row] = {}
    table: list[Row] = []
    for row, k in phrases:
        if row["id"] not in loaded:
            sample = load(row)
            pixels = image_to_tensor(sample["image"], side).numpy().tobytes()
            loaded[row["id"]] = sample | {"pixels": pixels, "refined": refined_masks(sample)}
        sample = loaded[row["id"]]
        refined = sample["refined"][k]
        masks = {
            "mask": _resized(sample["labels"][k], side),
            "refined": None if refined is None else _resized(refined, side),
        }
        table.append({"id": f"{row['id']}#{k}", "caption": sample["captions"][k], "image": sample["pixels"], **masks})
    yield pa.Table.from_pylist(table, schema=PIXELS)


def _resized(mask: NDArray[np.uint8], side: int) -> bytes:
    return (mask_to_tensor(mask, side)[0] > 0).to(torch.uint8).numpy().tobytes()


def _masks(data: Sequence[bytes], side: int) -> Tensor:
    """[B, 3, R, R] in {-1, 1}, as `mask_to_tensor` gives them."""
    flat = np.frombuffer(b"".join(data), np.uint8).reshape(-1, 1, side, side).copy()
    return (torch.from_numpy(flat).float() * 2 - 1).expand(-1, 3, -1, -1)


def odd_phrases(captions: Iterable[list[str]], base: Path) -> list[str]:
    """What of the captions of some samples is not learnt as it is written, as lines for the user; `base`: a folder."""
    phrases = [caption for own in captions for caption in own]
    said = [p for p in phrases if p.strip()]
    cut = count_cut(base, said)
    notes = {
        f"{len(phrases) - len(said)} empty phrases were left out": len(phrases) > len(said),
        f"{cut} phrases are longer than the text encoder takes; it saw only their beginnings": cut,
    }
    return [note for note, is_so in notes.items() if is_so]


def _askable(captions: list[list[str]]) -> tuple[list[list[int]], NDArray[np.int64]]:
    """Numbers of the phrases of each sample that aren't empty, and how many there are."""
    numbers = list(map(askable, captions))
    return numbers, np.array([len(own) for own in numbers], dtype=np.int64)


def _require_phrases(counts: NDArray[np.int64], folder: Path) -> None:
    if not counts.sum():
        raise DataError(f"{folder} holds no phrase to train on")
