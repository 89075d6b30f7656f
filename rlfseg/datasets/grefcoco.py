"""gRefCOCO: a sentence may mean several objects, or nothing in the picture, which is an all-zero mask.

    grefcoco/grefs(unc).json  grefcoco/instances.json
    images/mscoco/images/train2014/COCO_train2014_000000581857.jpg

As RefCOCO, but in JSON and with a list of annotations a ref; `[-1]` stands for none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlfseg.datasets.lists import read_items
from rlfseg.datasets.records import Plan
from rlfseg.datasets.refer import from_refs, one_of


def plan(path: Path, images: str | None, splits: Sequence[str]) -> Plan:
    """Reads `grefs(*).json` and the `instances.json` beside it.

    Args:
        path: The JSON file, or its folder if that holds only one.
        images: Folder of the pictures; None: as in REFER's own layout.
        splits: Splits to keep, such as `testA`; empty: all.

    Returns:
        A record for every picture that a sentence is about.

    Raises:
        DataError: A file is damaged or not of this form; names the place.
        ConfigError: No folder of pictures, or several lists in a folder.
    """
    path = one_of(path, "grefs(*).json")
    return from_refs(path, (ref for _, ref in read_items(path)), images, splits)
