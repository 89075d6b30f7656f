"""Export: what training and refining made, in the form in which other tools read it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

from rlfseg import adapter, images
from rlfseg.config import ExportConfig, PrepareConfig
from rlfseg.datasets.records import Loaded
from rlfseg.errors import ConfigError
from rlfseg.hdf5 import Reader
from rlfseg.pipeline import prepare
from rlfseg.pipeline.samples import REFINED, open_samples
from rlfseg.pipeline.stages import Summary

COLUMNS = ("id", "shard", *REFINED)  # of a refined sample: what its label is made from


def run(config: ExportConfig) -> Summary:
    """Writes into `config.out` an adapter for diffusers, or refined labels as HDF5.

    Args:
        config: Settings of the command.

    Returns:
        Counts and seconds.

    Raises:
        BadSample: A sample can't be read and `on_error` is `stop`.
        ConfigError: Not one of `adapter` and `samples` is given, or these samples were not refined.
        ModelError: The adapter can't be loaded, or is a whole UNet, which diffusers reads as it is.
    """
    if (config.adapter is None) == (config.samples is None):
        raise ConfigError(
            "adapter: give an adapter to write for diffusers, or samples: a folder of `refine`; one of them"
        )
    if config.samples is not None:
        return _refined(config, config.samples)
    start = time.monotonic()
    written = adapter.export(adapter.resolve(str(config.adapter)), Path(config.out).absolute())
    return Summary(
        name="export",
        out=str(written),
        rows_in=1,
        rows_out=1,
        refused={},
        seconds=time.monotonic() - start,
    )


def _refined(config: ExportConfig, folder: str) -> Summary:
    """The samples written anew, by what writes them in `prepare`: shards, index, resumed and counted alike."""
    samples = open_samples(folder)
    if not set(REFINED) <= set(samples.rows.column_names):
        raise ConfigError(f"samples: {folder} was written by `prepare`, not by `refine`: it is HDF5 already")
    job = prepare.Job(
        items=[json.dumps(row) for row in samples.rows.select(COLUMNS).to_pylist()],
        load=Refined(samples.folder),
        id_of=_id,
        shard="refined",
        attributes={"source": "refine"},
        identity={"refined": samples.fingerprint},
    )
    settings = PrepareConfig(
        out=config.out,
        source="hdf5",
        path=str(Path(folder).absolute()),
        workers=config.workers,
        on_error=config.on_error,
    )
    return replace(prepare.write(job, settings), name="export")


def _id(item: str) -> str:
    return str(json.loads(item)["id"])


class Refined:
    """A sample of `refine` as text -> the sample with its refined labels; one that was kept is as it was.

    Args:
        folder: Folder of the shards that were refined.
    """

    def __init__(self, folder: Path):
        self.reader = Reader(folder)

    def __call__(self, item: str) -> Loaded:
        """Reads one sample.

        Args:
            item: `id`, `shard`, `masks` and `outcomes` as JSON.

        Returns:
            The sample; a label that changed no longer tells its instances.

        Raises:
            BadSample: The file or the sample is damaged.
        """
        row = json.loads(item)
        sample = self.reader.sample(row["shard"], row["id"])
        size = sample.image.shape[:2]
        phrases = tuple(
            replace(p, mask=images.rle_decode(mask, size), instances=None) if outcome == "refined" else p
            for p, mask, outcome in zip(sample.phrases, row["masks"], row["outcomes"], strict=True)
        )
        return Loaded(replace(sample, phrases=phrases), {}, {})
