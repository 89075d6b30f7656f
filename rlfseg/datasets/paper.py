"""HDF5 files in the paper's own form (A.3.2), by its authors or by us: read with suspicion, written anew.

What they hold comes through as it is: captions, masks, and objects, tasks and COCO ids where a file has them, and what
it says of its source, its rasteriser and its texts. Of a file that crashed or hung its reader nothing is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlfseg.datasets.raster import Rule
from rlfseg.datasets.records import Counts, Loaded, Plan, Record
from rlfseg.errors import BadSample, DataError
from rlfseg.hdf5 import Seen, list_shards, preflight, read_sample


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
    found = list(preflight(files))
    dead = {f.file: str(f) for f in found if isinstance(f, BadSample) and f.sample is None}  # not to be opened here
    bad = {_name(f): dead.get(f.file, str(f)) for f in found if isinstance(f, BadSample) or f.file in dead}
    good = [f for f in found if isinstance(f, Seen) and f.file not in dead]
    records = [
        Record(id=f.id, image=f.file, size=f.size, split="", phrases=(), source=f.file, coco_id=f.coco_id) for f in good
    ]
    return Plan(
        name="HDF5",
        records=records,
        found={"": Counts(len(good), sum(len(f.captions) for f in good))},
        bad=bad,
        attributes=_told(good),
    )


def _name(found: Seen | BadSample) -> str:
    sample = found.id if isinstance(found, Seen) else found.sample
    return found.file if sample is None else f"{found.file} [{sample}]"


def _told(found: Sequence[Seen]) -> dict[str, str]:
    """What the files say of themselves; where they differ, all of it."""
    told: dict[str, set[str]] = {}
    for one in found:
        for key, text in one.attributes.items():
            told.setdefault(key, set()).add(text)
    return {key: "; ".join(sorted(texts)) for key, texts in told.items()}


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
