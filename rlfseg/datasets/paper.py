"""HDF5 files in the paper's own form (A.3.2), by its authors or by us: read with suspicion, written anew.

What they hold comes through as it is: captions, masks, and objects, tasks and COCO ids where the file has them.
"""

from __future__ import annotations

from pathlib import Path

from rlfseg.datasets.raster import Rule
from rlfseg.datasets.records import Counts, Loaded, Plan, Record
from rlfseg.errors import BadSample, DataError
from rlfseg.hdf5 import list_shards, preflight, read_sample


def plan(path: Path) -> Plan:
    """Reads every sample of every file in a child process with limits (`hdf5.preflight`).

    Args:
        path: A file, or a folder of files.

    Returns:
        A record a sample; what is damaged is in `bad`.

    Raises:
        DataError: No HDF5 files there.
    """
    files = list_shards(path) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: no HDF5 files there")
    records, bad, phrases = [], {}, 0
    for seen in preflight(files):
        if isinstance(seen, BadSample):
            bad[seen.sample or seen.file] = str(seen)
            continue
        phrases += len(seen.captions)
        records.append(
            Record(
                id=seen.id,
                image=seen.file,
                size=seen.size,
                split="",
                phrases=(),
                source=seen.file,
                coco_id=seen.coco_id,
            )
        )
    return Plan(name="HDF5", records=records, found={"": Counts(len(records), phrases)}, bad=bad)


def load(record: Record, rule: Rule) -> Loaded:
    """A record's sample.

    Args:
        record: A record of the plan.
        rule: Has no effect: the masks are there.

    Returns:
        The sample; nothing is left out.

    Raises:
        BadSample: It can't be read after all.
    """
    return Loaded(read_sample(record.image, record.id), {}, {})
