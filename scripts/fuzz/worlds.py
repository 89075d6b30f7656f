"""What is handed in: a small valid world for each kind of input."""

from __future__ import annotations

from collections.abc import Callable

from annotations import (
    coco,
    excluded,
    grefcoco,
    labelme,
    listed,
    listed_by_line,
    panoptic,
    phrasecut,
    refer,
    stuff,
    tabled,
)
from pictures import formats
from stored import (
    asked,
    card,
    checked,
    embedded,
    index,
    predicted_lines,
    predicted_masks,
    predicted_table,
    rle,
    shard,
    stage_rows,
    state,
    weights,
)
from world import World

# Share of the inputs where it isn't 1.
SHARES = {
    "hdf5": 8,
    "png": 3,
    "jpeg": 3,
    "refer": 3,
    "phrasecut": 2,
    "coco": 2,
    "list": 2,
    "parquet": 2,
    "rle": 2,
    "weights": 0.2,
}
WORLDS: dict[str, Callable[[], World]] = {
    "hdf5": shard,
    **formats(),
    "list": listed,
    "lines": listed_by_line,
    "table": tabled,
    "phrasecut": phrasecut,
    "refer": refer,
    "grefcoco": grefcoco,
    "coco": coco,
    "panoptic": panoptic,
    "stuff": stuff,
    "excluded": excluded,
    "labelme": labelme,
    "rle": rle,
    "parquet": asked,
    "embedded": embedded,
    "rows": stage_rows,
    "checked": checked,
    "predictions": predicted_lines,
    "predicted": predicted_table,
    "masks": predicted_masks,
    "index": index,
    "state": state,
    "card": card,
    "weights": weights,
}  # fmt: skip
