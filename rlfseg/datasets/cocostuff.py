"""COCO-Stuff: a phrase is a class that is present in a picture's label map, its mask all pixels of that class.

    stuffthingmaps/val2017/000000000139.png     value = label id - 1, 0 to 181; 255 is unlabelled
    images/val2017/000000000139.jpg

The maps are opened with the pictures, so phrases are counted at the end. The task of a phrase is its label id.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from rlfseg.datasets.coco import OFFICIAL, readable
from rlfseg.datasets.lists import pictures_folder
from rlfseg.datasets.raster import Rule
from rlfseg.datasets.records import Counts, Entry, Loaded, Plan, Record, load
from rlfseg.errors import BadSample, DataError
from rlfseg.images import list_images, load_labels

VOID = 255
# labels.txt, from id 1 on: 91 things, of which 11 never occur, and 91 stuff classes.
LABELS = re.split(
    r",\s+",
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, street sign,
    stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, hat, backpack,
    umbrella, shoe, eye glasses, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat,
    baseball glove, skateboard, surfboard, tennis racket, bottle, plate, wine glass, cup, fork, knife, spoon, bowl,
    banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed,
    mirror, dining table, window, desk, toilet, door, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven,
    toaster, sink, refrigerator, blender, book, clock, vase, scissors, teddy bear, hair drier, toothbrush, hair brush,
    banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other,
    ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble,
    floor-other, floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel,
    ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper,
    pavement, pillow, plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug,
    salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table,
    tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other, wall-panel, wall-stone,
    wall-tile, wall-wood, water-other, waterdrops, window-blind, window-other, wood""",
)
PHRASES = tuple(map(readable, LABELS))  # by value


def plan(path: Path, images: str | None) -> Plan:
    """Lists label maps and the pictures of the same names.

    Args:
        path: Folder of the label maps, PNG, of one split.
        images: Folder of the pictures; None: as in COCO-Stuff's own layout.

    Returns:
        A record a label map, its split the folder's name, its phrases not known yet.

    Raises:
        DataError: No label maps there.
        ConfigError: No folder of pictures.
    """
    maps = sorted(p for p in path.glob("*.png") if not p.name.startswith("."))
    if not maps:
        raise DataError(f"{path}: no PNG there; give the folder of one split's label maps, e.g. stuffthingmaps/val2017")
    folder = pictures_folder(images, path.parent.parent / "images" / path.name, path.parent.parent / path.name)
    names = {p.stem: p.name for p in list_images(folder)}
    records = [
        Record(
            id=(coco_id := str(int(p.stem)) if p.stem.isascii() and p.stem.isdigit() else None) or p.stem,
            image=str(folder / names.get(p.stem, f"{p.stem}.jpg")),
            size=None,
            split=path.name,
            phrases=(),
            source=str(p),
            labels=str(p),
            coco_id=coco_id,
        )
        for p in maps
    ]
    return Plan(
        name="COCO-Stuff",
        records=records,
        found={path.name: Counts(len(records), None)},
        official={s: c for s, c in OFFICIAL.items() if s == path.name},
        folder=str(folder),
        listed=frozenset(Path(r.image).name for r in records),
    )


def load_classes(record: Record, rule: Rule) -> Loaded:
    """A record's picture with a phrase for every class in its label map, by rising label.

    Args:
        record: A record of the plan.
        rule: Has no effect: a label map needs no drawing.

    Returns:
        As `records.load`.

    Raises:
        BadSample: As `records.load`, or a value that is no label of COCO-Stuff.
    """
    assert record.labels is not None
    present = np.unique(load_labels(record.labels, name=record.labels, sample=record.id))
    values = [int(value) for value in present if value != VOID]
    if wrong := [value for value in values if not 0 <= value < len(PHRASES)]:
        reason = f"holds the value {wrong[0]}; COCO-Stuff's are 0 to {len(PHRASES) - 1} (label id - 1) and {VOID}"
        raise BadSample(reason, file=record.labels, sample=record.id)
    phrases = tuple(Entry(caption=PHRASES[value], task=str(value + 1), values=(value,)) for value in values)
    return load(replace(record, phrases=phrases), rule)
