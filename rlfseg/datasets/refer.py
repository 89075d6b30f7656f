"""RefCOCO, RefCOCO+ and G-Ref in the form of the REFER toolbox: every sentence is a phrase of its own.

    refcoco/refs(unc).p  refcoco/instances.json      refcoco+/ the same
    refcocog/refs(umd).p  refs(google).p  instances.json
    images/mscoco/images/train2014/COCO_train2014_000000581857.jpg

`refs(*).p` is a pickle. Its opcodes are looked through before it is loaded: only those that make lists, dicts, tuples,
texts and numbers are let through, so nothing in it is ever called. The phrase is the sentence's `sent`, as the field
trains and tests on it, not its `raw`; the task is `ref_id__sent_id`.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlfseg.datasets.coco import Annotations, Tree, outline_of, read_annotations
from rlfseg.datasets.lists import as_object, brief, field, pictures_folder
from rlfseg.datasets.raster import Outline
from rlfseg.datasets.records import Counts, Entry, Plan, Record
from rlfseg.errors import ConfigError, DataError

# Pictures and sentences of each split, as published.
OFFICIAL = {
    ("refcoco", "unc"): {
        "train": Counts(16_994, 120_624),
        "val": Counts(1_500, 10_834),
        "testA": Counts(750, 5_657),
        "testB": Counts(750, 5_095),
    },
    ("refcoco+", "unc"): {
        "train": Counts(16_992, 120_191),
        "val": Counts(1_500, 10_758),
        "testA": Counts(750, 5_726),
        "testB": Counts(750, 4_889),
    },
    ("refcocog", "umd"): {"train": Counts(21_899, 80_512), "val": Counts(1_300, 4_896), "test": Counts(2_600, 9_602)},
    ("refcocog", "google"): {"train": Counts(24_698, 85_474), "val": Counts(4_650, 9_536)},
}
MOST_BYTES = 1 << 28
NAME = re.compile(r"g?refs\((\w+)\)\.(?:p|json)")
# Opcodes that build plain data. None of them imports, calls or copies anything.
PLAIN = re.compile(
    "PROTO|FRAME|STOP|MARK|NONE|NEWTRUE|NEWFALSE|(BIN)?FLOAT|INT|BININT[12]?|LONG1?|(SHORT_)?BINSTRING|STRING"
    "|(SHORT_)?BINUNICODE|UNICODE|(EMPTY_)?(LIST|DICT|TUPLE)|TUPLE[123]|APPENDS?|SETITEMS?|(LONG_)?BIN(PUT|GET)|PUT|GET"
    "|MEMOIZE"
)
# What Python's unpickler raises on bytes that were damaged or made to mislead it.
BROKEN = (pickle.UnpicklingError, ValueError, LookupError, EOFError, TypeError, AttributeError, OverflowError)


def plan(path: Path, images: str | None, splits: Sequence[str]) -> Plan:
    """Reads `refs(*).p` and the `instances.json` beside it.

    Args:
        path: The pickle, or its folder if that holds only one.
        images: Folder of the pictures; None: as in REFER's own layout.
        splits: Splits to keep, such as `testA`; empty: all.

    Returns:
        A record for every picture that a sentence is about. One that is in several splits, as in Google's, is of
        `train+val`.

    Raises:
        DataError: A file is damaged, hostile or not of this form; names the place.
        ConfigError: No folder of pictures, or several pickles in a folder.
    """
    path = one_of(path, "refs(*).p")
    return from_refs(path, read_refs(path), images, splits)


def one_of(path: Path, pattern: str) -> Path:
    """A file, or the one file of that name in a folder; ConfigError where there are none or several."""
    if not path.is_dir():
        return path
    found = sorted(path.glob(pattern.replace("(", "[(]").replace(")", "[)]")))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise ConfigError(f"path: {path} must hold one {pattern}, it holds {names}; give the file itself")
    return found[0]


def from_refs(path: Path, refs: Iterable[Tree], images: str | None, splits: Sequence[str]) -> Plan:
    """The plan of a list of refs, whose `ann_id` is a number, or a list of them as in gRefCOCO.

    Args:
        path: Where the list came from; `instances.json` lies beside it.
        refs: The list.
        images: As in `plan`.
        splits: As in `plan`.

    Returns:
        As `plan`.

    Raises:
        DataError: A ref isn't of this form; names it.
        ConfigError: No folder of pictures.
    """
    known = read_annotations(path.parent / "instances.json")
    root = path.parent.parent
    usual = ("images/mscoco/images/train2014", "images/train2014", "train2014")
    folder = pictures_folder(images, *(root / name for name in usual))
    phrases: dict[int, list[Entry]] = {}
    of_splits: dict[int, set[str]] = {}
    pictures: dict[str, set[int]] = {}
    sentences: Counter[str] = Counter()
    for image, split, entries in _phrases(refs, known, path):
        pictures.setdefault(split, set()).add(image)
        sentences[split] += len(entries)
        if not splits or split in splits:
            phrases.setdefault(image, []).extend(entries)
            of_splits.setdefault(image, set()).add(split)
    records = [
        Record(
            id=str(image),
            image=str(folder / known.pictures[image].file),
            size=known.pictures[image].size,
            split="+".join(sorted(of_splits[image])),
            phrases=tuple(entries),
            source=str(path),
            coco_id=str(image),
        )
        for image, entries in phrases.items()
    ]
    by = NAME.fullmatch(path.name)
    return Plan(
        name=f"{path.parent.name} {path.name}",
        records=records,
        rule="pycocotools",
        found={split: Counts(len(ids), sentences[split]) for split, ids in pictures.items()},
        official=OFFICIAL.get((path.parent.name, by[1] if by else ""), {}),
        folder=str(folder),
        listed=frozenset(p.file for p in known.pictures.values()),
        attributes={"text": "sent"},
    )


def _phrases(refs: Iterable[Tree], known: Annotations, path: Path) -> Iterator[tuple[int, str, list[Entry]]]:
    """Image id, split and entries of every ref."""
    outlines = {}
    for n, row in enumerate(known.rows):
        here = f"annotations[{n}]"
        outlines[field(row, "id", int, here, known.path)] = outline_of(row, here, known.path)
    room = path.stat().st_size  # a pickle can hold one sentence a million times
    for n, ref in enumerate(refs):
        where = f"[{n}]"
        image = field(as_object(ref, where, path), "image_id", int, where, path)
        ref_id = field(ref, "ref_id", int, where, path)
        if image not in known.pictures:
            raise DataError(f"{path}, {where}: no image of {known.path} has id {image}")
        meant = _meant(ref, outlines, where, path)
        objects, ids = tuple(outlines[key] for key in meant), tuple(map(str, meant))
        entries = []
        for k, sentence in enumerate(field(ref, "sentences", list, where, path)):
            here = f"{where}.sentences[{k}]"
            sent_id = field(as_object(sentence, here, path), "sent_id", int, here, path)
            text = field(sentence, "sent", str, here, path)
            entries.append(Entry(caption=text, task=f"{ref_id}__{sent_id}", objects=objects, annotations=ids))
        room -= sum(1 + len(entry.caption) for entry in entries)
        if room < 0:
            raise DataError(f"{path}, {where}: more text than the file has bytes; it is made to unfold")
        yield image, field(ref, "split", str, where, path), entries


def _meant(ref: Tree, outlines: dict[int, Outline], where: str, path: Path) -> list[int]:
    """Ids of what a ref is about; none where it says that nothing in the picture is meant: `[-1]`, or no id."""
    meant = ref.get("ann_id")
    if meant == [-1]:
        return []
    ids: list[Any] = meant if isinstance(meant, list) else [meant]
    if unknown := [key for key in ids if not isinstance(key, int) or key not in outlines]:
        raise DataError(f"{path}, {where}: instances.json has no annotation {brief(unknown[0])}")
    return ids


# --- the pickle ------------------------------------------------------------------------------------------------------


def read_refs(path: Path) -> list[Any]:
    """Loads a pickle of plain data, of any protocol, written by Python 2 or 3.

    Args:
        path: The file.

    Returns:
        Its list.

    Raises:
        DataError: It would import or call something, is damaged, too large, or holds no list.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"{path}: {path.stat().st_size:,} bytes; the limit is {MOST_BYTES:,}")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error})") from error
    try:
        _check_opcodes(data, path)
        tree = _load(data)
    except DataError:
        raise
    except BROKEN as error:
        raise DataError(f"{path}: not a whole pickle ({error})") from error
    if not isinstance(tree, list):
        raise DataError(f"{path}: must hold a list of refs, this is a {type(tree).__name__}")
    return tree


def _check_opcodes(data: bytes, path: Path) -> None:
    """Refuses a pickle that does more than build plain data, before any of it is carried out."""
    for number, (opcode, argument, position) in enumerate(pickletools.genops(data)):
        if not PLAIN.fullmatch(opcode.name):
            asks = f" {argument!a:.80}" if isinstance(argument, str) else ""
            raise DataError(
                f"{path}: at byte {position} it asks for {opcode.name}{asks}, which plain data never does; "
                "it may be hostile, and nothing of it was run"
            )
        # Python reserves memory for as many remembered objects as the highest number says.
        if opcode.name.endswith("PUT") and isinstance(argument, int) and argument > number + 1:
            raise DataError(f"{path}: at byte {position} it remembers object {argument}, and has made at most {number}")


def _load(data: bytes) -> Any:
    try:
        return _Plain(io.BytesIO(data), encoding="utf-8").load()
    except UnicodeDecodeError:  # Python 2's texts have no encoding
        return _Plain(io.BytesIO(data), encoding="latin-1").load()


class _Plain(pickle.Unpickler):  # the second lock; the first is `_check_opcodes`
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
