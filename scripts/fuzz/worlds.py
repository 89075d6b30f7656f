"""What is handed in: a small valid world for each kind of input, of which one file is mutated, and the reader of it."""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import json
import os
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import mutate
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rlfseg import hdf5, images
from rlfseg.config import PrepareConfig
from rlfseg.errors import DataError, RlfsegError

Mutation = Callable[[random.Random, bytes], bytes]
WIDTH, HEIGHT = 14, 10
MARK = "ran-code-of-a-pickle"  # a file that a hostile pickle would make


@dataclass(frozen=True, kw_only=True)
class World:
    """Files, what mutates each of some of them, and what reads the whole; it raises what a user would see."""

    files: dict[str, bytes]
    mutations: dict[str, Mutation]
    read: Callable[[Path], object]

    def place(self, folder: Path) -> None:
        """Writes the valid world."""
        for name, data in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)

    def mutated(self, rng: random.Random) -> tuple[str, bytes]:
        """A file's name and what to put there."""
        name = rng.choice(sorted(self.mutations))
        return name, self.mutations[name](rng, self.files[name])


# --- pictures --------------------------------------------------------------------------------------------------------


def _picture(mode: str = "RGB") -> Image.Image:
    shape = (HEIGHT, WIDTH) if mode in ("L", "1") else (HEIGHT, WIDTH, len(mode))
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(noise > 127 if mode == "1" else noise)


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def pictures(form: str, variants: dict[str, bytes]) -> World:
    """Files of one format, read as picture, mask, label map and size."""

    def read(folder: Path) -> None:
        for load in (images.load_mask, images.load_labels, images.image_size):
            with contextlib.suppress(DataError):
                load(folder / "input", name="input", max_pixels=1_000_000)  # type: ignore[operator]
        images.load_image(folder / "input", name="input", max_pixels=1_000_000)

    mutation = mutate.of_png if form == "PNG" else mutate.of_bytes

    def any_of(rng: random.Random, _: bytes) -> bytes:
        return mutation(rng, variants[rng.choice(sorted(variants))])

    return World(files={"input": next(iter(variants.values()))}, mutations={"input": any_of}, read=read)


def _formats() -> dict[str, Callable[[], World]]:
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb, grey, alpha = _picture(), _picture("L"), _picture("RGBA")
    wide = Image.fromarray(np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 400)
    many = {"save_all": True, "append_images": [grey.convert("RGB"), rgb]}
    variants: dict[str, dict[str, Callable[[], bytes]]] = {
        "PNG": {
            "rgb": lambda: _encoded(rgb, "PNG", exif=exif.tobytes()),
            "palette": lambda: _encoded(rgb.quantize(7), "PNG", transparency=2),
            "16": lambda: _encoded(wide, "PNG"),
            "1": lambda: _encoded(_picture("1"), "PNG"),
            "alpha": lambda: _encoded(alpha, "PNG", pnginfo=None),
            "animated": lambda: _encoded(rgb, "PNG", **many),
        },
        "JPEG": {
            "rgb": lambda: _encoded(rgb, "JPEG", exif=exif.tobytes()),
            "grey": lambda: _encoded(grey, "JPEG", progressive=True),
            "cmyk": lambda: _encoded(rgb.convert("CMYK"), "JPEG"),
        },
        "WEBP": {
            "lossy": lambda: _encoded(alpha, "WEBP", exif=exif.tobytes()),
            "lossless": lambda: _encoded(rgb, "WEBP", lossless=True),
            "animated": lambda: _encoded(rgb, "WEBP", **many),
        },
        "TIFF": {
            "raw": lambda: _encoded(rgb, "TIFF"),
            "lzw": lambda: _encoded(rgb, "TIFF", compression="tiff_lzw"),
            "deflate": lambda: _encoded(rgb, "TIFF", compression="tiff_adobe_deflate"),
            "jpeg": lambda: _encoded(rgb, "TIFF", compression="jpeg"),
            "g4": lambda: _encoded(_picture("1"), "TIFF", compression="group4"),
            "16": lambda: _encoded(wide, "TIFF"),
            "pages": lambda: _encoded(rgb, "TIFF", **many),
        },
        "GIF": {"one": lambda: _encoded(rgb, "GIF"), "animated": lambda: _encoded(rgb, "GIF", **many)},
        "BMP": {"rgb": lambda: _encoded(rgb, "BMP"), "palette": lambda: _encoded(rgb.quantize(5), "BMP")},
        "PPM": {"rgb": lambda: _encoded(rgb, "PPM"), "16": lambda: _encoded(wide, "PPM")},
        "AVIF": {"rgb": lambda: _encoded(rgb, "AVIF")},
        "JPEG2000": {"rgb": lambda: _encoded(rgb, "JPEG2000")},
    }  # fmt: skip
    return {
        form.lower(): lambda form=form, made=made: pictures(form, {k: make() for k, make in made.items()})  # type: ignore[misc]
        for form, made in variants.items()
    }


# --- annotations -----------------------------------------------------------------------------------------------------

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
PNG = _encoded(_picture(), "PNG")
MASK = _encoded(_picture("1"), "PNG")


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


def _dumped(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def listed() -> World:
    phrases = [{"phrase": "dog", "mask": "m.png", "task_id": "1"}, {"phrase": "a/b", "mask": "m.png"}]
    image = {"image": "a.png", "image_id": 30, "split": "val", "width": WIDTH, "height": HEIGHT, "phrases": phrases}
    files = {"a.png": PNG, "m.png": MASK, "index.json": _dumped({"images": [image, {"image": "a.png", "phrases": []}]})}
    return source("folder", "index.json", files, {"index.json": mutate.of_json})


def listed_by_line() -> World:
    rows = [{"image": "a.png", "phrase": p, "mask": "m.png", "split": "val"} for p in ("dog", "cat", "")]
    files = {"a.png": PNG, "m.png": MASK, "phrases.jsonl": b"".join(_dumped(row) + b"\n" for row in rows)}
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
        "refer_val.json": _dumped([task, {**task, "task_id": "30__2"}]),
        "image_data_split.json": _dumped([picture]),
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
        "refcoco/instances.json": _dumped(INSTANCES),
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
        "grefcoco/grefs(unc).json": _dumped(refs),
        "grefcoco/instances.json": _dumped(INSTANCES),
    }
    return source("grefcoco", "grefcoco", files, {"grefcoco/grefs(unc).json": mutate.of_json})


def coco() -> World:
    files = {"images/a.png": PNG, "annotations/instances_val2017.json": _dumped(INSTANCES)}
    return source(
        "coco", "annotations/instances_val2017.json", files, {"annotations/instances_val2017.json": mutate.of_json}
    )


def panoptic() -> World:
    name = "annotations/panoptic_val2017.json"
    segments = [{"id": 1, "category_id": 18, "iscrowd": 0, "area": 3, "bbox": [0, 0, 3, 3]}]
    tree = {**INSTANCES, "annotations": [{"image_id": 30, "file_name": "a.png", "segments_info": segments}]}
    labels = _encoded(Image.fromarray(np.eye(HEIGHT, WIDTH, dtype=np.uint8)).convert("RGB"), "PNG")
    files = {"images/a.png": PNG, "annotations/panoptic_val2017/a.png": labels, name: _dumped(tree)}
    return source("coco", name, files, {name: mutate.of_json, "annotations/panoptic_val2017/a.png": mutate.of_png})


def stuff() -> World:
    values = np.random.default_rng(0).choice([0, 17, 91, 181, 255], (HEIGHT, WIDTH)).astype(np.uint8)
    grey = Image.fromarray(values)
    palette = grey.copy()
    palette.putpalette([n for n in range(256) for _ in range(3)])
    maps = {"grey": _encoded(grey, "PNG"), "palette": _encoded(palette, "PNG")}
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
    files[path] = _dumped({**INSTANCES, "images": images, "annotations": rows})
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
    return source("labelme", ".", {"a.json": _dumped(tree)}, {"a.json": mutate.of_json})


# --- run-length encodings, HDF5, Parquet, adapters -------------------------------------------------------------------


def rle() -> World:
    whole = np.asarray(_picture("1")).astype(np.uint8)
    compressed = {"size": [HEIGHT, WIDTH], "counts": images.rle_encode(whole)}

    def read(folder: Path) -> None:
        tree = json.loads((folder / "rle.json").read_bytes().decode(errors="surrogatepass"))
        if not isinstance(tree, dict) or not isinstance(tree.get("counts"), str | list):
            raise DataError("not of the type that callers hand in")
        size = tree.get("size")
        if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int for n in size):
            raise DataError("not of the type that callers hand in")
        images.rle_decode(tree["counts"], (size[0], size[1]))

    def of_counts(rng: random.Random, _: bytes) -> bytes:
        if rng.random() < 0.4:
            return _dumped(mutate.of_tree(rng, RLE))
        counts = mutate.of_bytes(rng, compressed["counts"].encode()).decode("latin-1")  # type: ignore[union-attr]
        return _dumped(mutate.of_tree(rng, compressed) if rng.random() < 0.2 else {**compressed, "counts": counts})

    def of_odd(rng: random.Random, data: bytes) -> bytes:
        mutated = of_counts(rng, data)
        return mutated if mutated.startswith(b"{") else b"{}"

    return World(files={"rle.json": _dumped(compressed)}, mutations={"rle.json": of_odd}, read=read)


def shard() -> World:
    """Read in batches, in the child of `hdf5.preflight`: see run.py."""
    stream = Path("shard-of-fuzz.h5")
    noise = np.asarray(_picture())
    mask = np.asarray(_picture("1")).astype(np.uint8)
    phrases = (
        hdf5.Labelled(caption="a/b é", mask=mask, instances=mask[None], task="1"),
        hdf5.Labelled(caption="dog", mask=mask),
    )
    hdf5.write_shard(stream, [hdf5.Sample(id=i, image=noise, phrases=phrases, coco_id="5") for i in ("1", "2")])
    ours = stream.read_bytes()
    with h5py.File(stream, "w") as file:
        file["3/image"], file["3/mask/white/dog"] = noise, mask
        file.create_dataset("3/mask/cat", data=mask, compression="lzf", shuffle=True, chunks=(5, 7))
        file["3"].attrs["note"] = "é" * 300
    theirs = stream.read_bytes()
    stream.unlink()

    def any_of(rng: random.Random, _: bytes) -> bytes:
        return mutate.of_bytes(rng, rng.choice((ours, theirs)))

    return World(files={"a.h5": ours}, mutations={"a.h5": any_of}, read=lambda folder: None)


def _parquet(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()


def _of_table(tree: dict[str, list[Any]]) -> Mutation:
    """Bytes of a Parquet file are changed, or a valid one is written of columns of other types."""

    def mutation(rng: random.Random, data: bytes) -> bytes:
        if rng.random() < 0.7:
            return mutate.of_bytes(rng, data)
        columns = mutate.of_tree(rng, tree)
        try:
            return _parquet(pa.table(columns if isinstance(columns, dict) else {"x": [1]}))
        except (pa.ArrowException, ValueError, TypeError, OverflowError, AttributeError):
            return mutate.of_bytes(rng, data)

    return mutation


def asked() -> World:
    """A list of pictures as `predict` reads it."""
    tree = {"path": ["a.png", "b/c.png", "a.png"], "phrases": [["dog"], ["left dog", "é"], []]}
    files = {"asked.parquet": _parquet(pa.table(tree))}

    def read(folder: Path) -> None:
        from rlfseg.pipeline.pictures import find

        find(str(folder / "asked.parquet"), ["dog"], "phrases")

    return World(files=files, mutations={"asked.parquet": _of_table(tree)}, read=read)


def embedded() -> World:
    """Pictures inside of a Parquet file."""
    tree = {"image": [PNG, PNG], "phrases": [["dog"], ["left dog", "é"]]}
    files = {"pictures.parquet": _parquet(pa.table(tree))}

    def read(folder: Path) -> None:
        from rlfseg.pipeline import pictures as p

        p._embedded.cache_clear()  # the file was another before
        found = p.find(str(folder / "pictures.parquet"), ["dog"], "phrases")
        for row in found.rows.to_pylist()[:3]:
            found.read(row)

    return World(files=files, mutations={"pictures.parquet": _of_table(tree)}, read=read)


def stage_rows() -> World:
    from rlfseg.pipeline.verify import verified

    mask = images.rle_encode(np.asarray(_picture("1")).astype(np.uint8))
    tree = {"id": ["1", "2"], "status": ["ok", "ok"], "captions": [["dog"], ["cat"]], "masks": [[mask], [mask]]}
    small = pa.table({**tree, "height": pa.array([HEIGHT] * 2, pa.int32()), "width": pa.array([WIDTH] * 2, pa.int32())})
    files = {"rows.parquet": _parquet(small)}
    return World(files=files, mutations={"rows.parquet": _of_table(tree)}, read=lambda f: verified(f / "rows.parquet"))


def predictions(name: str, data: bytes, mutation: Mutation) -> World:
    """Another system's predictions, as `evaluate` finds and reads them."""
    known = pa.table({"id": ["30", "31"], "captions": [["dog", "a/b", "dog"], ["cat"]]})
    tasks = {"30": ("1", "2", "3"), "31": (None,)}

    def read(folder: Path) -> None:
        from rlfseg.pipeline.predictions import LoadPredicted, find

        load = LoadPredicted(folder, "scores", ["cat"])
        for row in find(known, folder, ("cat",)).rows.to_pylist():
            load(row, (HEIGHT, WIDTH), row["captions"], tasks[row["id"]])

    return World(files={name: data, "m.png": MASK}, mutations={name: mutation}, read=read)


def predicted_lines() -> World:
    rows = [{"id": "30", "phrase": p, "png": "m.png", "task": t} for p, t in (("dog", 3), ("a/b", "2"), ("cat", "1"))]
    data = b"".join(_dumped(row) + b"\n" for row in [*rows, {"id": 31, "phrase": "cat", "png": "m.png"}])
    return predictions("predictions.jsonl", data, mutate.of_lines)


def predicted_table() -> World:
    data = b'id,phrase,png,task\r\n30,"dog",m.png,1\r\n30,a/b,m.png,\r\n31,cat,m.png,\r\n'
    return predictions("predictions.csv", data, mutate.of_bytes)


def predicted_masks() -> World:
    mask = images.rle_encode(np.asarray(_picture("1")).astype(np.uint8))
    tree = {"id": ["30", "31"], "captions": [["dog", "cat"], ["cat"]], "masks": [[mask, None], [mask]]}
    return predictions("a.parquet", _parquet(pa.table(tree)), _of_table(tree))


def checked() -> World:
    """Annotations as `verify` reads them, without their pictures."""
    from rlfseg.pipeline.verify import verified

    segments = {"image_id": 30, "file_name": "a.png", "segments_info": []}
    tree = {**INSTANCES, "annotations": [*INSTANCES["annotations"], segments]}  # type: ignore[misc]
    files = {"a.json": _dumped(tree)}
    return World(files=files, mutations={"a.json": mutate.of_json}, read=lambda f: verified(f / "a.json"))


def index() -> World:
    row = {"id": "1", "shard": "a.h5", "height": 10, "width": 14, "captions": ["a"], "n_phrases": 1, "bytes": 5}
    table = pa.Table.from_pylist([row, {**row, "id": "2"}], schema=hdf5.INDEX_SCHEMA)
    files = {hdf5.INDEX: _parquet(table)}
    mutation = _of_table(table.to_pydict())
    return World(files=files, mutations={hdf5.INDEX: mutation}, read=lambda f: hdf5.read_index(f).to_pylist())


def state() -> World:
    from rlfseg.pipeline.samples import open_samples

    done = {"schema": 1, "hash": "x", "identity": {"samples": ".", "fingerprint": "x"}, "rows_in": 1}
    rows = _parquet(pa.table({"id": ["1"], "status": ["ok"], "shard": ["a.h5"]}))
    files = {"f/_STARTED.json": _dumped(done), "f/_SUCCESS.json": _dumped(done), "f/data/0.parquet": rows}
    return World(files=files, mutations={"f/_SUCCESS.json": mutate.of_json}, read=lambda f: open_samples(f / "f"))


def _small_adapter(folder: Path) -> tuple[Any, dict[str, bytes]]:
    import torch

    from rlfseg import adapter
    from rlfseg.backbone import Backbone
    from rlfseg.config import BackboneConfig, LoraConfig

    torch.set_num_threads(1)
    backbone = Backbone.load(BackboneConfig(base="tiny", resolution=64, device="cpu"))
    pristine = copy.deepcopy(backbone.velocity.unet)
    backbone.add_lora(LoraConfig(rank=2, targets=("to_q",)))
    for weight in backbone.trainable():
        weight.data.fill_(0.01)
    adapter.save(backbone, folder, adapter.Card(base="tiny", resolution=64, metrics={"miou": 0.5}, config={"seed": 1}))
    backbone.velocity.unet = pristine
    return backbone, {
        p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".yaml")
    }


def card() -> World:
    from rlfseg import adapter

    folder = adapter.ASSETS / "adapter"
    name = adapter.CARD
    files = {name: (folder / name).read_bytes()}

    def of_yaml(rng: random.Random, data: bytes) -> bytes:
        import yaml

        if rng.random() < 0.5:
            return yaml.safe_dump(mutate.of_tree(rng, yaml.safe_load(data))).encode(errors="surrogatepass")
        return mutate.of_bytes(rng, data)

    return World(files=files, mutations={name: of_yaml}, read=adapter.read_card)


def weights() -> World:
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        backbone, files = _small_adapter(Path(made))
    pristine = backbone.velocity.unet

    def read(folder: Path) -> None:
        backbone.velocity.unet = copy.deepcopy(pristine)
        backbone.load_lora(folder)

    def of_safetensors(rng: random.Random, data: bytes) -> bytes:
        if rng.random() < 0.5:
            return mutate.of_bytes(rng, data)
        length = int.from_bytes(data[:8], "little")
        header = _dumped(mutate.of_tree(rng, json.loads(data[8 : 8 + length])))
        return len(header).to_bytes(8, "little") + header + data[8 + length :]

    mutations = {"adapter_model.safetensors": of_safetensors, "adapter_config.json": mutate.of_json}
    return World(files=files, mutations=mutations, read=read)


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
    **_formats(),
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
