"""Prepare: a data set becomes HDF5 shards in the paper's layout, with an index. A row is a shard, whole or absent."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rlfseg import hdf5
from rlfseg.config import PrepareConfig, ShapesConfig, WorkersConfig, as_dict
from rlfseg.datasets import shapes, sources
from rlfseg.datasets.raster import Rule
from rlfseg.datasets.records import Loaded, Record
from rlfseg.errors import BadSample, DataError
from rlfseg.hdf5 import Labelled, Sample
from rlfseg.pipeline.folders import good_rows, require_finished, stamp
from rlfseg.pipeline.rows import OK, Attempts, Row, Rows, reason, refused
from rlfseg.pipeline.stages import Stage, Summary, run_stage

# JSON: image -> why it isn't there; phrase -> why it isn't, isn't whole, or neither asks for nor shows anything
NOTES = ("refused", "skipped", "partly", "empty")
SCHEMA = pa.schema(
    [("id", pa.string()), ("status", pa.string()), ("images", pa.int64()), *((name, pa.string()) for name in NOTES)]
)
ITEM_DEATHS = 1  # of an item, which is always alone: one less than its shard, which goes on without it
PHRASES = "phrases.parquet"  # what a source tells of its phrases beyond their masks: id, task, ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """What there is to write.

    Attributes:
        items: An image each, as text that `load` takes.
        load: Makes the sample of an item.
        id_of: The id that it will have.
        shard: How shards are called; a number follows.
        attributes: Stored at the root of every file.
        identity: What of the input changes the result.
        report: For `_SUCCESS.json`.
        refused: Image -> why it isn't among the items.
        phrases: See PHRASES.
        sorts: Columns of it that go into the index, for evaluation by subset.
    """

    items: list[str]
    load: Callable[[str], Loaded]
    id_of: Callable[[str], str]
    shard: str
    attributes: dict[str, str]
    identity: Row
    report: Row | None = None
    refused: dict[str, str] = field(default_factory=dict)
    phrases: pa.Table | None = None
    sorts: tuple[str, ...] = ()


def run(config: PrepareConfig) -> Summary:
    """Writes the shards and the index of `config.out`.

    Args:
        config: Settings of the command.

    Returns:
        Counts, refusals, seconds, and what is short, missing or unused.

    Raises:
        BadSample: An image or mask can't be used and `on_error` is `stop`.
        DataError: A list is damaged, or images are missing and `on_error` is `stop`.
        ConfigError: `path` is missing for a source that needs one, or another setting is wrong.
    """
    job = _drawing(config) if config.source == "shapes" else _converting(config)
    return write(job, config)


def write(job: Job, config: PrepareConfig) -> Summary:
    """Writes what a job holds; arguments, result and errors are those of `run`."""
    out = Path(config.out).absolute()
    starts = range(0, len(job.items), config.images_per_shard)
    parts = [job.items[n : n + config.images_per_shard] for n in starts]
    names = [f"{job.shard}-{n:05d}" for n in range(len(parts))]
    settings = as_dict(config)
    identity = {k: settings[k] for k in ("source", "path", "splits", "shapes", "images_per_shard")} | job.identity
    summary = run_stage(
        Stage(
            name="prepare",
            rows=pa.table({"id": names, "items": pa.array(parts, pa.large_list(pa.large_string()))}),
            load=_nothing_to_load,
            work=ShardWriter,
            kwargs={
                "out": out,
                "load": job.load,
                "id_of": job.id_of,
                "attributes": job.attributes,
                "skip": config.on_error == "skip",
            },
            schema=SCHEMA,
            out=out,
            run=WorkersConfig(workers=min(config.workers, len(parts)), batch_size=1),
            identity=identity,
            unit="shards",
            largest_task=1,  # of some hundred pictures
            on_error=config.on_error,
            finalize=lambda counts: _index(out, counts, job, dict(zip(names, parts, strict=True))),
        )
    )
    report = require_finished(out).get("report")
    return replace(summary, notes=sources.notes(report)) if report else summary


def _drawing(config: PrepareConfig) -> Job:
    return Job(
        items=[str(n) for n in range(config.shapes.count)],
        load=partial(_draw, config.shapes),
        id_of=partial(_scene_id, config.shapes),
        shard=f"{config.shapes.split}-{config.shapes.labels}",
        attributes={"source": "shapes"},
        identity={},
    )


def _converting(config: PrepareConfig) -> Job:
    found = sources.survey(config)
    items = [record.to_json() for record in found.records]
    settings = as_dict(config)
    return Job(
        items=items,
        load=partial(_load, config.source, found.rule),
        id_of=_record_id,
        shard="shard",
        attributes=found.attributes,
        # Other annotations under the same path, a picture that came to be missing or was fetched again: another job.
        identity={k: settings[k] for k in ("images", "rasteriser", "exclude_ids")}
        | {"records": _digest(items), "files": _digest(map(_state, found.records))},
        report=found.report,
        refused=found.refused,
        phrases=found.phrases,
        sorts=found.sorts,
    )


def _digest(texts: Iterable[str]) -> str:
    digest = sha256()
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()[:12]


def _state(record: Record) -> str:
    """Size and time of every file that holds pixels of a record."""
    return repr([found for found in map(stamp, record.files()) if found])


class ShardWriter:
    """Writes one HDF5 shard a row; an item on which two writers died is refused, and the shard gets on.

    Args:
        out: Folder of the shards.
        load: Makes the sample of an item; raises BadSample.
        id_of: The id that it will have.
        attributes: Stored at the root of every file.
        skip: Count and leave out a bad image instead of refusing its shard.
    """

    def __init__(
        self,
        out: Path,
        load: Callable[[str], Loaded],
        id_of: Callable[[str], str],
        attributes: dict[str, str],
        *,
        skip: bool,
    ):
        self.out, self.load, self.id_of, self.attributes, self.skip = out, load, id_of, attributes, skip
        self.attempts = Attempts(out / "_attempts" / "items", ITEM_DEATHS)

    def __call__(self, rows: Rows) -> Rows:
        """Rows `id`, `items` in; `images` and NOTES out."""
        return [self._shard(row) for row in rows]

    def _shard(self, row: Row) -> Row:
        notes: dict[str, dict[str, str]] = {name: {} for name in NOTES}
        try:
            count = hdf5.write_shard(self.out / f"{row['id']}.h5", self._samples(row["items"], notes), self.attributes)
        except BadSample as error:
            return refused(row, error)
        told = {name: json.dumps(noted) for name, noted in notes.items()}
        return {"id": row["id"], "status": OK, "images": count, **told}

    def _samples(self, items: list[str], notes: dict[str, dict[str, str]]) -> Iterator[Sample]:
        for item in items:
            row = {"id": self.id_of(item), "item": item}
            try:
                [done] = self.attempts.guard(self._load, [row])
                if done["status"] != OK:
                    raise BadSample(reason(done["status"]), file="prepare", sample=row["id"])
            except BadSample as error:
                if not self.skip:
                    raise
                notes["refused"][row["id"]] = str(error)
                continue
            loaded = done["loaded"]
            notes["skipped"] |= loaded.skipped
            notes["partly"] |= loaded.partly
            notes["empty"] |= _empty(loaded.sample)
            yield loaded.sample

    def _load(self, rows: Rows) -> Rows:
        return [{"id": row["id"], "status": OK, "loaded": self.load(row["item"])} for row in rows]


def _empty(sample: Sample) -> dict[str, str]:
    """Phrases that neither ask for nor show anything: both are data (gRefCOCO means it), and both may be a mistake."""
    return {
        f"{sample.id}: {phrase.task or number}": "no text" if not phrase.caption.strip() else "no pixel"
        for number, phrase in enumerate(sample.phrases)
        if not (phrase.caption.strip() and phrase.mask.any())
    }


def _load(source: str, rule: Rule, item: str) -> Loaded:
    return sources.loader(source)(Record.from_json(item), rule)


def _record_id(item: str) -> str:
    return Record.from_json(item).id


def _scene_id(config: ShapesConfig, item: str) -> str:
    return f"{config.split}-{int(item):06d}"


def _draw(config: ShapesConfig, item: str) -> Loaded:
    return Loaded(drawn(int(item), config), {}, {})


def drawn(index: int, config: ShapesConfig) -> Sample:
    """A scene as a sample, with exact or coarse labels."""
    scene = shapes.draw_scene(index, split=config.split, seed=config.seed, size=config.size, n_phrases=config.phrases)
    coarse = config.labels == "coarse"
    return Sample(
        id=_scene_id(config, str(index)),
        image=scene.image,
        phrases=tuple(
            Labelled(
                caption=p.caption,
                mask=p.coarse if coarse else p.mask,
                instances=p.coarse_instances if coarse else p.instances,
            )
            for p in scene.phrases
        ),
    )


def _nothing_to_load(row: Row) -> Row:
    return row


def _index(out: Path, counts: Row, job: Job, parts: dict[str, list[str]]) -> Row:
    """Builds the index and counts images instead of shards; of a refused shard every image is refused."""
    notes: dict[str, dict[str, str]] = {name: {} for name in NOTES}
    for row in good_rows(out, NOTES):
        for name, noted in notes.items():
            noted |= json.loads(row[name])
    bad = notes.pop("refused")
    for shard, why in counts["refused"].items():
        bad |= {job.id_of(item): f"its shard {shard}: {why}" for item in parts[shard]}
    index = hdf5.build_index(out, [out / f"{shard}.h5" for shard in parts if shard not in counts["refused"]])
    if index.num_rows + len(bad) != len(job.items):
        raise DataError(
            f"{out}: of {len(job.items)} images {index.num_rows} were written and {len(bad)} refused; delete it and "
            "start again"
        )
    listed = {} if job.phrases is None else {"phrase_rows": job.phrases.num_rows}
    if job.phrases is not None:
        pq.write_table(job.phrases, out / PHRASES, write_page_checksum=True)
        hdf5.add_columns(out, _sorts(index, job.phrases, job.sorts, notes["skipped"]))
    return {
        "rows_in": len(job.items) + len(job.refused),
        "rows_out": index.num_rows,
        "refused": job.refused | bad,
        "phrases": sum(index["n_phrases"].to_pylist()),
        **listed,
    } | ({"report": job.report | notes} if job.report else {})


def _sorts(index: pa.Table, phrases: pa.Table, sorts: tuple[str, ...], skipped: dict[str, str]) -> dict[str, pa.Array]:
    """Columns for the index: a text for each phrase of an image, in the order of its captions."""
    kept: dict[str, list[Row]] = {}
    for row in phrases.to_pylist():
        if f"{row['id']}: {row['task']}" not in skipped:
            kept.setdefault(row["id"], []).append(row)
    of_images = [kept[image] for image in index["id"].to_pylist()]
    return {
        name: pa.array([[row[name] for row in rows] for rows in of_images], pa.list_(pa.string())) for name in sorts
    }
