"""datasets/refer.py and grefcoco.py: real refs against the toolbox's own logic, and pickles that mean harm."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco
import pytest
from numpy.typing import NDArray
from PIL import Image

from rlfseg.config import PrepareConfig
from rlfseg.datasets import records, refer, sources
from rlfseg.errors import ConfigError, DataError

# pycocotools 2.0.11 hands NumPy 2 an array in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
Tree = Any
SQUARE = [2, 2, 2, 6, 6, 6, 6, 2]
INNER = [3, 3, 3, 5, 5, 5, 5, 3]


def settings(path: Path, source: Any = "refer", **more: Any) -> PrepareConfig:
    return PrepareConfig(out="unused", source=source, path=str(path), **more)


def ref(number: int, image: int, ann: Any, *sents: str, split: str = "val") -> Tree:
    sentences = [
        {"tokens": s.split(), "raw": s.upper(), "sent_id": 10 * number + n, "sent": s} for n, s in enumerate(sents)
    ]
    ids = [s["sent_id"] for s in sentences]
    name = f"COCO_train2014_{image:012}_{number}.jpg"  # a file of this name doesn't exist
    return {"ref_id": number, "image_id": image, "ann_id": ann, "split": split, "sentences": sentences} | {
        "sent_ids": ids,
        "file_name": name,
        "category_id": 1,
    }


REFS = [
    ref(1, 7, 71, "left dog", "the dog that is on the left", "dog"),
    ref(2, 8, 81, "cat", split="train"),
    ref(3, 7, 72, "left dog"),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """`refcoco` with two pictures of 10 x 8 pixels and four annotations."""
    pictures = tmp_path / "images" / "mscoco" / "images" / "train2014"
    pictures.mkdir(parents=True)
    folder = tmp_path / "refcoco"
    folder.mkdir()
    images = [{"id": i, "file_name": f"COCO_train2014_{i:012}.jpg", "width": 10, "height": 8} for i in (7, 8)]
    for image in images:
        Image.new("RGB", (10, 8)).save(pictures / str(image["file_name"]))
    crowd = {"size": [8, 10], "counts": [8, 16, 56]}
    shapes = {71: (7, [SQUARE, INNER]), 72: (7, [[0, 0, 1, 0]]), 73: (7, [INNER]), 81: (8, crowd)}
    rows = [
        {"id": k, "image_id": i, "segmentation": s, "category_id": 1, "iscrowd": int(k == 81), "area": 1, "bbox": []}
        for k, (i, s) in shapes.items()
    ]
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": rows}))
    (folder / "refs(unc).p").write_bytes(pickle.dumps(REFS, 2))
    return folder


def as_refer_draws(annotation: Tree, image: Tree) -> NDArray[np.bool_]:
    """The toolbox's getMask for polygons, but with its sum of the parts taken as what it is meant to be: a union."""
    encoded = coco.frPyObjects(annotation["segmentation"], image["height"], image["width"])
    inside: NDArray[np.bool_] = coco.decode(encoded).sum(axis=2) > 0
    return inside


@pytest.mark.parametrize(
    ("name", "splits", "sentences"),
    [
        ("refcoco/refs(unc).p", {"val": 4, "testB": 6}, 10),
        ("refcoco+/refs(unc).p", {"val": 6, "testB": 6}, 12),
        ("refcocog/refs(umd).p", {"test": 5}, 5),
        ("refcocog/refs(google).p", {"val": 10}, 10),
    ],
)
def test_every_real_sentence_is_a_sample_with_the_toolboxs_mask(
    shared_data: Path, name: str, splits: dict[str, int], sentences: int
) -> None:
    path = shared_data / "native_formats" / "refer" / name
    refs = pickle.loads(path.read_bytes())  # noqa: S301  our own copy, in a test
    tree = json.loads((path.parent / "instances.json").read_text())
    annotations, images = ({row["id"]: row for row in tree[key]} for key in ("annotations", "images"))
    survey = sources.survey(settings(path))
    assert {s: c["found"]["phrases"] for s, c in survey.report["splits"].items() if c["found"]["images"]} == splits
    phrases = {p.task: (r, p) for r in survey.records for p in records.load(r, survey.rule).sample.phrases}
    assert len(phrases) == sentences
    for one in refs:
        truth = as_refer_draws(annotations[one["ann_id"]], images[one["image_id"]])
        for sentence in one["sentences"]:
            record, phrase = phrases[f"{one['ref_id']}__{sentence['sent_id']}"]
            assert phrase.caption == sentence["sent"]
            assert (record.id, record.coco_id, record.split) == (str(one["image_id"]), record.id, one["split"])
            assert np.array_equal(phrase.mask, truth)
            assert phrase.mask.sum() == pytest.approx(annotations[one["ann_id"]]["area"], rel=0.05)


@pytest.mark.fault("ingest-04", part="sentences")
def test_each_sentence_counts_and_splits_are_kept_apart(root: Path) -> None:
    survey = sources.survey(settings(root, splits=("val",)))
    (record,) = survey.records
    sample, skipped, partly = records.load(record, survey.rule)
    assert [(p.caption, p.task) for p in sample.phrases] == [
        ("left dog", "1__10"),
        ("the dog that is on the left", "1__11"),
        ("dog", "1__12"),
    ]
    assert (list(skipped), partly) == (["7: 3__30"], {})  # a line has no area
    assert {p.mask.sum() for p in sample.phrases} == {16}  # the part inside is no hole
    assert survey.attributes == {"source": "refcoco refs(unc).p", "text": "sent", "rasteriser": "pycocotools"}
    assert sources.notes(survey.report) == (
        "val is not the official split: 1 images instead of 1,500 and 4 phrases instead of 10,834",
    )
    with pytest.raises(ConfigError, match="is in testA; it has train, val"):
        sources.survey(settings(root, splits=("val", "testA")))


def test_official_splits_that_are_absent_are_told(root: Path) -> None:
    told = sources.notes(sources.survey(settings(root)).report)
    assert "testA is not the official split: 0 images instead of 750 and 0 phrases instead of 5,657" in told


def test_a_crowd_is_its_rle(root: Path) -> None:
    (record,) = sources.survey(settings(root, splits=("train",))).records
    (phrase,) = records.load(record, "pil").sample.phrases
    assert np.flatnonzero(phrase.mask.T).tolist() == list(range(8, 24))


def test_googles_split_shares_pictures(root: Path) -> None:
    (root / "refs(google).p").write_bytes(pickle.dumps([*REFS, ref(4, 7, 73, "nose", split="train")]))
    with pytest.raises(ConfigError, match=r"must hold one refs\(\*\)\.p, it holds refs\(google\)\.p, refs\(unc\)\.p"):
        sources.survey(settings(root))
    path = root / "refs(google).p"
    assert {r.id: r.split for r in sources.survey(settings(path)).records} == {"7": "train+val", "8": "train"}
    for split, phrases in (("train", 1), ("val", 4)):
        found = {r.id: r for r in sources.survey(settings(path, splits=(split,))).records}
        assert len(found["7"].phrases) == phrases
        assert found["7"].split == split


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ({"ann_id": 99}, r"\[0\]: instances\.json has no annotation 99"),
        ({"ann_id": None}, "no annotation None"),
        ({"ann_id": [71, "x"]}, "no annotation 'x'"),
        ({"image_id": 9}, r"\[0\]: no image of .*instances\.json has id 9"),
        ({"sentences": 7}, "'sentences' must be a list"),
        ({"sentences": [{"sent_id": 1}]}, r"\[0\]\.sentences\[0\]: 'sent' must be text"),
        ({"split": None}, "'split' must be text"),
    ],
)
def test_a_bad_ref_is_named(root: Path, spoil: Tree, reason: str) -> None:
    (root / "refs(unc).p").write_bytes(pickle.dumps([REFS[0] | spoil]))
    with pytest.raises(DataError, match=reason):
        sources.survey(settings(root))


# --- pickles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_of_any_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    plain = [*REFS, {"é/\0": [1.5, -1, 2**40, None, True, (1, "x"), (), (1, 2, 3, 4)]}]
    (tmp_path / "a.p").write_bytes(pickle.dumps(plain, protocol))
    assert refer.read_refs(tmp_path / "a.p") == plain


def test_texts_of_python_2_are_read(tmp_path: Path) -> None:
    # What Python 2.7 writes for [{'sent': 'caf\xc3\xa9', u'raw': u'caf\xe9'}, 12L], by protocol 2.
    data = b"\x80\x02]q\x00(}q\x01(U\x04sentq\x02U\x05caf\xc3\xa9q\x03X\x03\x00\x00\x00rawq\x04"
    data += b"X\x05\x00\x00\x00caf\xc3\xa9q\x05u\x8a\x01\x0ce."
    (tmp_path / "a.p").write_bytes(data)
    assert refer.read_refs(tmp_path / "a.p") == [{"sent": "café", "raw": "café"}, 12]
    (tmp_path / "a.p").write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nS'the dog'\np3\nsS'ref_id'\np4\nI12\nsa.")
    assert refer.read_refs(tmp_path / "a.p") == [{"sent": "the dog", "ref_id": 12}]
    (tmp_path / "a.p").write_bytes(b"]U\x04caf\xe9a.")
    assert refer.read_refs(tmp_path / "a.p") == ["café"]


class Evil:
    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> Any:
        function, *arguments = self.call
        return function, tuple(arguments)


HOSTILE = {
    "system": (lambda p: Evil(os.system, f"touch {p}"), r"asks for (GLOBAL|STACK_GLOBAL)"),
    "eval": (lambda p: Evil(eval, f"open({str(p)!r}, 'w')"), r"asks for (GLOBAL|STACK_GLOBAL)"),
    "array": (lambda p: np.arange(3), r"asks for (GLOBAL|STACK_GLOBAL)"),
    "set": (lambda p: {1, 2}, r"asks for"),
    "bytes": (lambda p: b"123", r"asks for"),
    "class": (lambda p: Path, r"asks for"),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_pickle_that_calls_something_is_refused_and_not_run(tmp_path: Path, kind: str, protocol: int) -> None:
    make, reason = HOSTILE[kind]
    touched = tmp_path / "touched"
    (tmp_path / "a.p").write_bytes(pickle.dumps([*REFS, make(touched)], protocol))
    with pytest.raises(DataError, match=rf"a\.p: at byte \d+ it {reason}.*nothing of it was run"):
        refer.read_refs(tmp_path / "a.p")
    assert not touched.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'touch touched'\ntR.",  # GLOBAL, REDUCE
        b"(S'touch touched'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch touched'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0dtouch touched\x85R.",  # STACK_GLOBAL
        b"\x80\x02\x82\x01.",  # EXT1
        b"Pname\n.",  # PERSID
        b"\x80\x02Nq\x00Q.",  # BINPERSID
        b"]}b.",  # BUILD
        b"\x80\x05\x97.",  # NEXT_BUFFER
        b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b".",  # BINBYTES8 of a terabyte
        b"]2a.",  # DUP: a list in itself
    ],
)
def test_every_opcode_that_does_more_is_refused(tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.p").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.p"):
        refer.read_refs(Path("a.p"))
    assert os.listdir() == ["a.p"]
    if b"\x8e" not in data:
        with contextlib.suppress(Exception):
            refer._load(data)  # the second lock, without the first
    assert os.listdir() == ["a.p"]


def test_what_only_takes_memory_is_refused(root: Path) -> None:
    data = {
        "memo": b"\x80\x02]r\xff\xff\xff\x7f.",  # LONG_BINPUT 2**31 - 1: Python would reserve 32 GB
        "text": b"\x80\x02X\xff\xff\xff\x7fabc.",  # a text of 2 GB that isn't there
        "digits": b"L" + b"9" * 10**6 + b"L\n.",
        "deep": b"(" * 10**6 + b".",
        "lists": b"]" * 10**6 + b"a" * (10**6 - 1) + b".",
    }
    shared = [{"sent_id": 1, "sent": "x"}] * 3_000  # 9 million sentences in 30 kB
    data["shared"] = pickle.dumps([ref(1, 7, 71) | {"sentences": shared}] * 3_000)
    long = "x" * 1_000_000
    data["long"] = pickle.dumps([ref(1, 7, 71) | {"sentences": [{"sent_id": n, "sent": long} for n in range(10**5)]}])
    wide: Tree = []
    for _ in range(60):
        wide = [wide, wide]  # its repr has 2 ** 60 brackets
    data["wide"] = pickle.dumps([wide])
    for name, content in data.items():
        (root / f"{name}.p").write_bytes(content)
    code = f"""
import resource, signal
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30)); signal.alarm(100)
from pathlib import Path
from rlfseg.datasets import refer
from rlfseg.errors import DataError
for name in {list(data)}:
    try:
        refer.plan(Path({str(root)!r}) / f"{{name}}.p", None, ())
    except DataError as error:
        print(name, error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(data)
    assert "remembers object 2147483647" in done.stdout
    assert "more text than the file has bytes" in done.stdout


def test_a_pickle_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = pickle.dumps(REFS, 2)
    for end in range(len(whole)):
        (tmp_path / "a.p").write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"a\.p: not a whole pickle"):
            refer.read_refs(tmp_path / "a.p")


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.p").write_bytes(pickle.dumps({"refs": []}))
    with pytest.raises(DataError, match="must hold a list of refs, this is a dict"):
        refer.read_refs(tmp_path / "a.p")
    (tmp_path / "a.p").write_text("<html>404</html>")
    with pytest.raises(DataError, match="not a whole pickle"):
        refer.read_refs(tmp_path / "a.p")
    with pytest.raises(DataError, match="can't be read"):
        refer.read_refs(tmp_path / "gone.p")
    monkeypatch.setattr(refer, "MOST_BYTES", 10)
    with pytest.raises(DataError, match="16 bytes; the limit is 10"):
        refer.read_refs(tmp_path / "a.p")


# --- gRefCOCO --------------------------------------------------------------------------------------------------------


def test_grefcoco_has_several_objects_or_none(root: Path) -> None:
    refs = [
        ref(1, 7, [71, 73], "both dogs"),
        ref(2, 7, [-1], "the zebra"),
        ref(3, 7, [73], "nose", "the nose"),
        ref(4, 7, [72, 73], "line and nose"),
        ref(5, 8, [], "a zebra"),
    ]
    (root / "grefs(unc).json").write_text(json.dumps(refs))
    survey = sources.survey(settings(root, "grefcoco"))
    first, second = (records.load(r, survey.rule) for r in survey.records)
    by_caption = {p.caption: p for p in (*first.sample.phrases, *second.sample.phrases)}
    areas = {c: [] if p.instances is None else p.instances.sum(axis=(1, 2)).tolist() for c, p in by_caption.items()}
    assert areas == {
        "both dogs": [16, 4],
        "the zebra": [],
        "nose": [4],
        "the nose": [4],
        "line and nose": [4],
        "a zebra": [],
    }
    assert by_caption["both dogs"].mask.sum() == 16
    assert by_caption["the zebra"].mask.shape == (8, 10)
    assert by_caption["the zebra"].mask.sum() == 0
    assert by_caption["the zebra"].instances is not None
    assert first.partly == {"7: 4__40": "1 objects, 1 polygons (annotation 72)"}
    assert (first.skipped, second.skipped, second.partly) == ({}, {}, {})
