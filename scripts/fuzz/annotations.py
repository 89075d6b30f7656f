"""Worlds of data sets: their lists, and what lies beside them."""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
import random
from pathlib import Path
from typing import Any

import mutate
import numpy as np
from pictures import encoded, picture
from PIL import Image
from world import HEIGHT, MARK, WIDTH, Mutation, World, dumped

from rlfseg.config import PrepareConfig
from rlfseg.errors import RlfsegError

SQUARE = [1, 1, 8, 1, 8, 7, 1, 7]
RLE = {"size": [HEIGHT, WIDTH], "counts": [20, 5, HEIGHT * WIDTH - 25]}
INSTANCES = {
    "images": [{"id": 30, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
    "annotations": [
        {"id": 1, "image_id": 30, "category_id": 18, "segmentation": [SQUARE], "iscrowd": 0, "bbox": [1, 1, 7, 6]},
        {"id": 2, "image_id": 30, "category_id": 18, "segmentation": RLE, "iscrowd": 1, "area": 5},
    ],
    "categories": [{"id": 18, "name": "dog"}],
}
SENTENCES = [{"tokens": ["dog"], "raw": "DOG!", "sent_id": 0, "sent": "dog"}]
REF = {"sent_ids": [0], "file_name": "a_1.png", "ann_id": 1, "ref_id": 0, "image_id": 30, "split": "val"}
REFS = [
    {**REF, "category_id": 18, "sentences": SENTENCES},
    {**REF, "ann_id": 2, "ref_id": 1, "sentences": SENTENCES * 2},
]
PNG = encoded(picture(), "PNG")
MASK = encoded(picture("1"), "PNG")


def source(name: str, path: str, files: dict[str, bytes], mutations: dict[str, Mutation]) -> World:
    """A data set as `prepare` reads it: its lists, then its first records."""

    def read(folder: Path) -> None:
        from rlfseg.datasets import sources

        config = PrepareConfig(out="none", source=name, path=str(folder / path), on_error="skip")  # type: ignore[arg-type]
        found = sources.survey(config)
        for record in found.records[:3]:
            sources.loader(name)(type(record).from_json(record.to_json()), found.rule)
        sources.notes(found.report)

    return World(files=files, mutations=mutations, read=read)


def listed() -> World:
    phrases = [{"phrase": "dog", "mask": "m.png", "task_id": "1"}, {"phrase": "a/b", "mask": "m.png"}]
    image = {"image": "a.png", "image_id": 30, "split": "val", "width": WIDTH, "height": HEIGHT, "phrases": phrases}
    files = {"a.png": PNG, "m.png": MASK, "index.json": dumped({"images": [image, {"image": "a.png", "phrases": []}]})}
    return source("folder", "index.json", files, {"index.json": mutate.of_json})


def listed_by_line() -> World:
    rows = [{"image": "a.png", "phrase": p, "mask": "m.png", "split": "val"} for p in ("dog", "cat", "")]
    files = {"a.png": PNG, "m.png": MASK, "phrases.jsonl": b"".join(dumped(row) + b"\n" for row in rows)}
    return source("folder", "phrases.jsonl", files, {"phrases.jsonl": mutate.of_lines})


def tabled() -> World:
    table = 'image,phrase,mask,split,width,height\na.png,"left, dog",m.png,val,14,10\na.png,cat,m.png,val,14,10\n'
    files = {"a.png": PNG, "m.png": MASK, "phrases.csv": table.encode("utf-8-sig")}
    return source("folder", "phrases.csv", files, {"phrases.csv": mutate.of_bytes})


def phrasecut() -> World:
    task = {
        "task_id": "30__1",
        "image_id": 30,
        "ann_ids": [1],
        "Polygons": [[[[1.5, 1.0], [8, 1], [8, 7.25]]], [[[2, 2], [5, 2], [5, 5], [2, 5]]]],
        "instance_boxes": [[1, 1, 7, 6], [2, 2, 3, 3]],
        "phrase": "brown dog",
        "phrase_structure": {"name": "dog", "attributes": ["brown"], "relation_ids": [], "relation_descriptions": []},
    }
    task["phrase_structure"]["type"] = "attribute"  # type: ignore[index]
    picture = {
        "image_id": 30,
        "coco_id": 5,
        "flickr_id": 6,
        "width": WIDTH,
        "height": HEIGHT,
        "url": "",
        "split": "val",
    }
    files = {
        "images/30.jpg": PNG,
        "refer_val.json": dumped([task, {**task, "task_id": "30__2"}]),
        "image_data_split.json": dumped([picture]),
    }
    return source("phrasecut", ".", files, dict.fromkeys(("refer_val.json", "image_data_split.json"), mutate.of_json))


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARK}",)


def _of_pickle(rng: random.Random, data: bytes) -> bytes:
    what = rng.random()
    if what < 0.5:
        tree = mutate.of_tree(rng, REFS)
        return pickle.dumps(tree, protocol=rng.randrange(5))
    if what < 0.6:
        tree = [*REFS, _Hostile()] if rng.random() < 0.5 else [{**REFS[0], "sentences": _Hostile()}]
        return pickle.dumps(tree, protocol=rng.randrange(5))
    return mutate.of_bytes(rng, pickle.dumps(REFS, protocol=rng.randrange(5)))


def refer() -> World:
    files = {
        "images/train2014/a.png": PNG,
        "refcoco/refs(unc).p": pickle.dumps(REFS, protocol=2),
        "refcoco/instances.json": dumped(INSTANCES),
    }
    world = source(
        "refer",
        "refcoco/refs(unc).p",
        files,
        {"refcoco/refs(unc).p": _of_pickle, "refcoco/instances.json": mutate.of_json},
    )

    def read(folder: Path) -> None:
        try:
            world.read(folder)
        finally:
            if Path(MARK).exists() or (folder / MARK).exists():
                raise AssertionError("a pickle ran code")

    return World(files=files, mutations=world.mutations, read=read)


def grefcoco() -> World:
    refs = [{**REFS[0], "ann_id": [1, 2]}, {**REFS[0], "ann_id": [-1], "ref_id": 1}]
    files = {
        "images/train2014/a.png": PNG,
        "grefcoco/grefs(unc).json": dumped(refs),
        "grefcoco/instances.json": dumped(INSTANCES),
    }
    return source("grefcoco", "grefcoco", files, {"grefcoco/grefs(unc).json": mutate.of_json})


def coco() -> World:
    files = {"images/a.png": PNG, "annotations/instances_val2017.json": dumped(INSTANCES)}
    return source(
        "coco", "annotations/instances_val2017.json", files, {"annotations/instances_val2017.json": mutate.of_json}
    )


def panoptic() -> World:
    name = "annotations/panoptic_val2017.json"
    segments = [{"id": 1, "category_id": 18, "iscrowd": 0, "area": 3, "bbox": [0, 0, 3, 3]}]
    tree = {**INSTANCES, "annotations": [{"image_id": 30, "file_name": "a.png", "segments_info": segments}]}
    labels = encoded(Image.fromarray(np.eye(HEIGHT, WIDTH, dtype=np.uint8)).convert("RGB"), "PNG")
    files = {"images/a.png": PNG, "annotations/panoptic_val2017/a.png": labels, name: dumped(tree)}
    return source("coco", name, files, {name: mutate.of_json, "annotations/panoptic_val2017/a.png": mutate.of_png})


def stuff() -> World:
    values = np.random.default_rng(0).choice([0, 17, 91, 181, 255], (HEIGHT, WIDTH)).astype(np.uint8)
    grey = Image.fromarray(values)
    palette = grey.copy()
    palette.putpalette([n for n in range(256) for _ in range(3)])
    maps = {"grey": encoded(grey, "PNG"), "palette": encoded(palette, "PNG")}
    name = "stuffthingmaps/val2017/000000000030.png"

    def any_of(rng: random.Random, _: bytes) -> bytes:
        return mutate.of_png(rng, maps[rng.choice(sorted(maps))])

    files = {"images/val2017/000000000030.jpg": PNG, name: maps["palette"]}
    return source("cocostuff", "stuffthingmaps/val2017", files, {name: any_of})


def excluded() -> World:
    """A list for `exclude_ids`, as a file and as text on the command line."""
    path = "annotations/instances_val2017.json"
    images = [{**INSTANCES["images"][0], "id": n, "file_name": f"{n}.png"} for n in range(3)]  # type: ignore[dict-item]
    rows = [{**INSTANCES["annotations"][0], "image_id": n} for n in range(3)]  # type: ignore[dict-item]
    files = {f"images/{n}.png": PNG for n in range(3)}
    files[path] = dumped({**INSTANCES, "images": images, "annotations": rows})
    files["leak.txt"] = b"1\n2.png\n000000000001.jpg\n"

    def read(folder: Path) -> None:
        from rlfseg.datasets import sources

        def survey(given: str) -> None:
            config = PrepareConfig(out="none", source="coco", path=str(folder / path), exclude_ids=given)
            sources.notes(sources.survey(config).report)

        with contextlib.suppress(RlfsegError):
            survey((folder / "leak.txt").read_bytes().decode(errors="surrogateescape").replace("\n", ","))
        survey(str(folder / "leak.txt"))

    return World(files=files, mutations={"leak.txt": mutate.of_bytes}, read=read)


def labelme() -> World:
    points = [[1, 1], [8, 1], [8, 7]]
    shapes = [
        {"label": "dog", "points": points, "group_id": None, "shape_type": "polygon", "flags": {}},
        {"label": "dog", "points": points[:2], "group_id": 1, "shape_type": "rectangle"},
        {"label": "ball", "points": points[:2], "group_id": 1, "shape_type": "circle"},
    ]
    picture = {"imagePath": "gone.png", "imageData": base64.b64encode(PNG).decode()}
    tree = {**picture, "imageHeight": HEIGHT, "imageWidth": WIDTH, "height": HEIGHT, "width": WIDTH, "shapes": shapes}
    return source("labelme", ".", {"a.json": dumped(tree)}, {"a.json": mutate.of_json})
