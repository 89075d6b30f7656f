"""A picture and its phrases before anything of it is opened, and the one way in which such a record becomes a sample.

Every data set is read into this form. A phrase says what it means in one of three ways: a mask file, the outlines of
its objects, or values in the record's label map.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rlfseg.datasets.raster import Drawn, Outline, Rule, rasterise
from rlfseg.errors import BadSample, DataError
from rlfseg.hdf5 import Labelled, Sample, check_sample
from rlfseg.images import Source, load_image, load_labels, load_mask

MAX_BYTES = 1 << 30  # of one sample's arrays: what a reader of HDF5 accepts
NAMED = 5  # annotations of a phrase that a message names


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One phrase of a record; exactly one of `mask`, `objects` and `values` is given.

    Attributes:
        caption: The phrase.
        task: Its id in the source, or None.
        mask: Path of its mask.
        objects: The outline of each object that it means; none: nothing in the picture, an all-zero mask.
        annotations: The id of each of them in the source, for messages; None where it has none.
        values: The value of each object in the record's label map.
    """

    caption: str
    task: str | None = None
    mask: str | None = None
    objects: tuple[Outline, ...] | None = None
    annotations: tuple[str, ...] | None = None
    values: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """One picture of a data set, nothing of it opened yet.

    Attributes:
        id: Its id in the source, else its path as the list has it.
        image: Path of the picture; of the annotation, where that names the picture or holds it.
        size: (height, width) that the list declares, in pixels; None where it doesn't.
        split: Its split; empty where the list has none.
        phrases: In the list's order; empty where they are read with the picture.
        source: Path of the list.
        labels: Path of its label map, or None.
        coco_id: The picture's id in COCO, where known.
    """

    id: str
    image: str
    size: tuple[int, int] | None
    split: str
    phrases: tuple[Entry, ...]
    source: str
    labels: str | None = None
    coco_id: str | None = None

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps({**vars(self), "phrases": [_given(entry) for entry in self.phrases]}, separators=(",", ":"))

    def files(self) -> list[str]:
        """Paths of everything that is decoded for it."""
        masks = [entry.mask for entry in self.phrases if entry.mask is not None]
        return [self.image, *masks] if self.labels is None else [self.image, self.labels, *masks]

    @classmethod
    def from_json(cls, text: str) -> Record:
        """What `to_json` gave."""
        tree = json.loads(text)
        tree["phrases"] = tuple(Entry(**_with_tuples(entry)) for entry in tree["phrases"])
        tree["size"] = tree["size"] and tuple(tree["size"])
        return cls(**tree)


def _given(entry: Entry) -> dict[str, Any]:
    return {key: value for key, value in vars(entry).items() if value is not None}


def _with_tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


class Counts(NamedTuple):
    """Pictures and phrases of a split; None where phrases aren't counted before the pictures are read."""

    images: int
    phrases: int | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the lists of a data set say, before any picture is opened.

    Attributes:
        name: The data set, as its files' attributes will name it.
        records: A record a picture.
        rule: How the set's own tools fill polygons.
        found: Split -> what its lists hold.
        official: Split -> what its makers say it holds.
        folder: Where the pictures are, if they are all in one place; for a word about those that no list names.
        listed: Names of the pictures in it that the lists know, of any split.
        attributes: More facts for the files' attributes.
        without_phrases: Pictures that no phrase is about and that are left out.
        bad: What couldn't even be listed -> why.
        phrases: A row a phrase: `id` of its picture, `task`, and what else the source tells of it that a sample has no
            place for.
        sorts: Columns of it that sort phrases, with few different texts; evaluation makes subsets of them.
    """

    name: str
    records: list[Record]
    rule: Rule = "pil"
    found: Mapping[str, Counts]
    official: Mapping[str, Counts] = field(default_factory=dict)
    folder: str | None = None
    listed: frozenset[str] = frozenset()
    attributes: Mapping[str, str] = field(default_factory=dict)
    without_phrases: int = 0
    bad: Mapping[str, str] = field(default_factory=dict)
    phrases: pa.Table | None = None
    sorts: tuple[str, ...] = ()


def tally(records: Iterable[Record]) -> dict[str, Counts]:
    """Pictures and phrases by split."""
    images: Counter[str] = Counter()
    phrases: Counter[str] = Counter()
    for record in records:
        images[record.split] += 1
        phrases[record.split] += len(record.phrases)
    return {split: Counts(images[split], phrases[split]) for split in images}


class Loaded(NamedTuple):
    """A sample, and what of its annotation couldn't be drawn; keys are `id: task`, or `id: number` without a task.

    Attributes:
        sample: The picture and its phrases.
        skipped: Phrases that were left out, and why.
        partly: Phrases that were drawn without some of their objects or polygons, and without how many.
    """

    sample: Sample
    skipped: dict[str, str]
    partly: dict[str, str]


def load(record: Record, rule: Rule, picture: Source | None = None) -> Loaded:
    """Decodes a record's picture and draws its masks at the picture's size.

    A phrase of which nothing can be drawn (no polygon, or none that covers a pixel) is left out and named; of a phrase
    of which something can, what can't is named.

    Args:
        record: A record of the plan.
        rule: How polygons are filled.
        picture: The picture, where it isn't the file `record.image`.

    Returns:
        The picture and its phrases, and what was left out.

    Raises:
        BadSample: The picture, a mask or a label map is missing, damaged or of another size than declared; an RLE
            doesn't add up; or a text isn't Unicode.
    """
    image = load_image(record.image if picture is None else picture, name=record.image, sample=record.id)
    size = (image.shape[0], image.shape[1])
    _check_size(record, size)
    _check_memory(record, image)
    labels = None if record.labels is None else _sized(record, record.labels, size, load_labels)
    phrases: list[Labelled] = []
    skipped: dict[str, str] = {}
    partly: dict[str, str] = {}
    for number, entry in enumerate(record.phrases):
        phrase, lost = _phrase(record, entry, size, labels, rule)
        if phrase is not None:
            phrases.append(phrase)
        if lost:
            (partly if phrase else skipped)[f"{record.id}: {entry.task or number}"] = lost
    sample = Sample(id=record.id, image=image, phrases=tuple(phrases), coco_id=record.coco_id)
    check_sample(sample, file=record.source)
    return Loaded(sample, skipped, partly)


def _check_size(record: Record, size: tuple[int, int]) -> None:
    if record.size is not None and record.size != size:
        turned = "; was it annotated before the EXIF rotation?" if record.size == size[::-1] else ""
        reason = f"is {_by(size)} pixels as displayed; {record.source} says {_by(record.size)}{turned}"
        raise BadSample(reason, file=record.image, sample=record.id)


def _check_memory(record: Record, image: NDArray[np.uint8]) -> None:
    planes = 3 + sum(1 + len(entry.objects or entry.values or ()) for entry in record.phrases)
    if (needed := planes * image[..., 0].size) > MAX_BYTES:
        reason = f"its picture and masks take {needed:,} bytes; the limit of one sample is {MAX_BYTES:,}"
        raise BadSample(reason, file=record.image, sample=record.id)


def _phrase(
    record: Record, entry: Entry, size: tuple[int, int], labels: NDArray[np.int32] | None, rule: Rule
) -> tuple[Labelled | None, str]:
    """The phrase, None if nothing of it can be drawn, and what was left out of it."""
    if entry.mask is not None:
        mask = _sized(record, entry.mask, size, load_mask)
        return Labelled(caption=entry.caption, mask=mask, task=entry.task), ""
    if entry.objects is not None:
        drawn = [_outline(record, entry, number, size, rule) for number in range(len(entry.objects))]
    else:
        assert labels is not None  # a record with values has a label map
        drawn = [Drawn((labels == value).view(np.uint8), 0) for value in entry.values or ()]
    objects = [d.mask for d in drawn if d.mask is not None and d.mask.any()]
    lost = _lost(entry, drawn)
    if drawn and not objects:
        return None, lost
    instances = np.stack(objects) if objects else np.zeros((0, *size), np.uint8)
    mask = np.bitwise_or.reduce(instances, axis=0)
    return Labelled(caption=entry.caption, mask=mask, instances=instances, task=entry.task), lost


def _covers(drawn: Drawn) -> bool:
    return drawn.mask is not None and bool(drawn.mask.any())


def _lost(entry: Entry, drawn: Sequence[Drawn]) -> str:
    """What of a phrase couldn't be drawn, and the ids of those annotations; empty where all could."""
    counts = {"objects": sum(not _covers(d) for d in drawn), "polygons": sum(d.dropped for d in drawn)}
    lost = ", ".join(f"{number} {what}" for what, number in counts.items() if number)
    if drawn and counts["objects"] == len(drawn):
        lost = "no outline that covers a pixel"
    bad = [n for n, d in enumerate(drawn) if d.dropped or not _covers(d)]
    ids = [known for n in bad if (known := _annotation(entry, n))]
    return f"{lost} ({', '.join(ids[:NAMED])}{', ...' if ids[NAMED:] else ''})" if ids else lost


def _annotation(entry: Entry, number: int) -> str:
    """An object as its source calls it; empty where that has no name for it."""
    if entry.annotations is not None:
        return f"annotation {entry.annotations[number]}"
    return "" if entry.values is None else f"value {entry.values[number]}"


def _outline(record: Record, entry: Entry, number: int, size: tuple[int, int], rule: Rule) -> Drawn:
    assert entry.objects is not None
    try:
        return rasterise(entry.objects[number], size, rule)
    except DataError as error:
        named = ", ".join(filter(None, (entry.task or "no id", _annotation(entry, number))))
        reason = f"the phrase {entry.caption!a:.80}, {named}: {error}"
        raise BadSample(reason, file=record.source, sample=record.id) from error


def _sized(record: Record, path: str, size: tuple[int, int], read: Callable[..., NDArray[Any]]) -> NDArray[Any]:
    """A mask or label map, if it has the picture's size."""
    array = read(path, name=path, sample=record.id)
    if array.shape != size:
        turned = "; was the mask drawn before the EXIF rotation?" if array.shape == size[::-1] else ""
        reason = f"the mask is {_by(array.shape)} pixels, its picture {_by(size)} as displayed{turned}"
        raise BadSample(reason, file=path, sample=record.id)
    return array


def _by(size: tuple[int, ...]) -> str:
    """Height and width as people write them."""
    return " x ".join(map(str, size[::-1]))
