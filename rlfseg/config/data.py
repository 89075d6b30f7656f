"""Settings of the commands that make and look at data sets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rlfseg.config.parts import STRICT, Natural, OutFolder, PositiveInt, WorkersConfig


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ShapesConfig:
    """Drawn scenes."""

    count: PositiveInt = 1000
    """Scenes to draw."""
    split: Literal["train", "val", "test"] = "train"
    """Scenes of different splits are independent, and none was seen by the shipped weights."""
    labels: Literal["exact", "coarse"] = "exact"
    """Exact masks, or polygon-like ones as human annotators draw them."""
    phrases: PositiveInt = 3
    """Phrases a scene at most."""
    size: Annotated[int, Field(ge=32, le=1024)] = 64
    """Side of a scene in pixels."""
    seed: Natural = 42
    """Seed of the world."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class PrepareConfig:
    """Writes a data set as HDF5 shards in the paper's layout (A.3.2), with an index."""

    out: OutFolder
    """Folder to write shards and index to."""
    source: Literal["shapes", "folder", "phrasecut", "refer", "grefcoco", "coco", "cocostuff", "labelme", "hdf5"] = (
        "shapes"
    )
    """`shapes` draws scenes; the others read a data set in its own form: docs/data.md has the layout of each."""
    path: str | None = None
    """The list of phrases, the annotation file or the folder of either; all but `shapes` need it."""
    images: str | None = None
    """Folder of the pictures; null: where the data set's own layout has it."""
    splits: tuple[str, ...] = ()
    """Keep only images whose split is one of these; empty: all."""
    rasteriser: Literal["auto", "pil", "pycocotools"] = "auto"
    """How polygons are filled; `auto`: as the set's own tools do. Stored with the masks: they differ at edges."""
    exclude_ids: str | None = None
    """Images to leave out, as `audit` finds them: a text file with one a line, or with commas between; ids, names of
    picture files or COCO ids."""
    shapes: ShapesConfig = Field(default_factory=ShapesConfig)
    """For `shapes`: what to draw."""
    images_per_shard: PositiveInt = 500
    """Images in one HDF5 file."""
    workers: PositiveInt = 2
    """Shards written at a time."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad sample does to the job: stop it, or be counted and skipped."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class InspectConfig:
    """Shows what is in files of samples, without trusting them."""

    files: tuple[str, ...]
    """HDF5 files, or folders that hold some."""
    out: OutFolder = "runs/inspect"
    """Folder to write contents.json and contact_sheet.png to; older ones are replaced."""
    pictures: Natural = 12
    """Samples on the contact sheet, evenly spread over the files."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class VerifyConfig:
    """Reads everything in files and folders, and fails at the first damage."""

    files: tuple[str, ...]
    """HDF5 files, pictures, lists of phrases, Parquet files, adapters, or folders that a command wrote."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class AuditConfig:
    """Finds the images that two sets share, by COCO ids and by perceptual hashes."""

    train: str
    """Folder written by `prepare`, or a folder of pictures: the set whose images are to be excluded."""
    test: str
    """The same: the set that should hold nothing of it."""
    out: OutFolder
    """Folder to write audit.json, exclude_ids.txt and pairs.png to."""
    distance: Annotated[int, Field(ge=0, le=64)] = 10
    """Most bits of 64 in which the hashes of two images differ that are looked at again. Ours: docs/files.md."""
    similarity: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Least correlation of their thumbnails that confirms it. Ours: docs/files.md."""
    pairs: Natural = 24
    """Pairs on the contact sheet, the most doubtful ones."""
    run: WorkersConfig = Field(default_factory=WorkersConfig)
    """Workers, batch size."""
    on_error: Literal["stop", "skip"] = "skip"
    """What an unreadable image does to the job: stop it, or be counted and left out of the comparison."""
