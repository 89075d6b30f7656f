"""Worlds of what commands write and read: run lengths, HDF5, Parquet, adapters."""

from __future__ import annotations

import copy
import io
import json
import random
from pathlib import Path
from typing import Any

import h5py
import mutate
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from annotations import INSTANCES, MASK, PNG, RLE
from pictures import picture
from world import HEIGHT, WIDTH, Mutation, World, dumped

from rlfseg import hdf5, images
from rlfseg.errors import DataError


def rle() -> World:
    whole = np.asarray(picture("1")).astype(np.uint8)
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
            return dumped(mutate.of_tree(rng, RLE))
        counts = mutate.of_bytes(rng, compressed["counts"].encode()).decode("latin-1")  # type: ignore[union-attr]
        return dumped(mutate.of_tree(rng, compressed) if rng.random() < 0.2 else {**compressed, "counts": counts})

    def of_odd(rng: random.Random, data: bytes) -> bytes:
        mutated = of_counts(rng, data)
        return mutated if mutated.startswith(b"{") else b"{}"

    return World(files={"rle.json": dumped(compressed)}, mutations={"rle.json": of_odd}, read=read)


def shard() -> World:
    """Read in batches, in the child of `hdf5.preflight`: see run.py."""
    stream = Path("shard-of-fuzz.h5")
    noise = np.asarray(picture())
    mask = np.asarray(picture("1")).astype(np.uint8)
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
        from rlfseg.pipeline import fetch
        from rlfseg.pipeline.pictures import find

        fetch._group.cache_clear()  # the file was another before
        found = find(str(folder / "pictures.parquet"), ["dog"], "phrases")
        for row in found.rows.to_pylist()[:3]:
            found.read(row)

    return World(files=files, mutations={"pictures.parquet": _of_table(tree)}, read=read)


def stage_rows() -> World:
    from rlfseg.pipeline.verify import verified

    mask = images.rle_encode(np.asarray(picture("1")).astype(np.uint8))
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
    data = b"".join(dumped(row) + b"\n" for row in [*rows, {"id": 31, "phrase": "cat", "png": "m.png"}])
    return predictions("predictions.jsonl", data, mutate.of_lines)


def predicted_table() -> World:
    data = b'id,phrase,png,task\r\n30,"dog",m.png,1\r\n30,a/b,m.png,\r\n31,cat,m.png,\r\n'
    return predictions("predictions.csv", data, mutate.of_bytes)


def predicted_masks() -> World:
    mask = images.rle_encode(np.asarray(picture("1")).astype(np.uint8))
    tree = {"id": ["30", "31"], "captions": [["dog", "cat"], ["cat"]], "masks": [[mask, None], [mask]]}
    return predictions("a.parquet", _parquet(pa.table(tree)), _of_table(tree))


def checked() -> World:
    """Annotations as `verify` reads them, without their pictures."""
    from rlfseg.pipeline.verify import verified

    segments = {"image_id": 30, "file_name": "a.png", "segments_info": []}
    tree = {**INSTANCES, "annotations": [*INSTANCES["annotations"], segments]}  # type: ignore[misc]
    files = {"a.json": dumped(tree)}
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
    files = {"f/_STARTED.json": dumped(done), "f/_SUCCESS.json": dumped(done), "f/data/0.parquet": rows}
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
        header = dumped(mutate.of_tree(rng, json.loads(data[8 : 8 + length])))
        return len(header).to_bytes(8, "little") + header + data[8 + length :]

    mutations = {"adapter_model.safetensors": of_safetensors, "adapter_config.json": mutate.of_json}
    return World(files=files, mutations=mutations, read=read)
