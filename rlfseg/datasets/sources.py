"""Which family reads which source, and what a look at its lists and folders says before any picture is opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from rlfseg.config import PrepareConfig
from rlfseg.datasets import coco, cocostuff, folder, grefcoco, labelme, paper, phrasecut, records, refer
from rlfseg.datasets.exclude import exclusion
from rlfseg.datasets.raster import Rule
from rlfseg.datasets.records import Counts, Loaded, Plan, Record
from rlfseg.errors import ConfigError, DataError
from rlfseg.images import SUFFIXES

# Sources for which a setting means something; for any other it is refused.
DRAWS = ("phrasecut", "refer", "grefcoco", "coco", "labelme")
HAS_PICTURES_APART = ("phrasecut", "refer", "grefcoco", "coco", "cocostuff")
NAMED = 5  # names that a line gives before it only counts


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A data set before its pictures are opened.

    Attributes:
        records: To be converted.
        rule: How polygons are filled.
        attributes: Facts for the attributes of the files.
        refused: Picture -> why it can't be converted, known already: it isn't on disk, for one.
        report: What is short, missing, unused or excluded, for `_SUCCESS.json`; `notes` says it in words.
        phrases: See `records.Plan`.
        sorts: See `records.Plan`.
    """

    records: list[Record]
    rule: Rule
    attributes: dict[str, str]
    refused: dict[str, str]
    report: dict[str, Any]
    phrases: pa.Table | None
    sorts: tuple[str, ...]


def survey(config: PrepareConfig) -> Survey:
    """Reads the lists of a data set and looks which of its pictures are there.

    Args:
        config: Settings of `prepare`; its source isn't `shapes`.

    Returns:
        What is to be converted, and what is not.

    Raises:
        ConfigError: A setting is missing, wrong or has no effect; or nothing is left to convert.
        DataError: A list is damaged; or pictures are missing and `on_error` is `stop`.
    """
    for setting, used_by in (("images", HAS_PICTURES_APART), ("rasteriser", DRAWS)):
        if getattr(config, setting) not in (None, "auto") and config.source not in used_by:
            raise ConfigError(f"{setting}: has no effect for source {config.source}; leave it out")
    plan = _plan(config)
    chosen = _of_splits(plan, config)
    excluded = exclusion(chosen, config.exclude_ids)
    kept = [r for r in chosen if r.id not in excluded.ids]
    missing = {r.id: f"{r.image}: no such file" for r in _missing(kept)}
    converted = [r for r in kept if r.id not in missing]
    refused = {**plan.bad, **missing}
    _check_enough(converted, refused, config)
    rule: Rule = plan.rule if config.rasteriser == "auto" else config.rasteriser
    drawn = {"rasteriser": rule} if config.source in DRAWS else {}
    unused = _unused(plan)
    report = {
        "name": plan.name,
        **drawn,
        "splits": _counts(plan, config.splits),
        "missing": sorted(Path(r.image).name for r in kept if r.id in missing),
        "unused": {"count": len(unused), "first": unused[:NAMED]},
        "excluded": sorted(excluded.ids),
        "exclusion": excluded.note,
        "without_phrases": plan.without_phrases,
    }
    return Survey(
        records=converted,
        rule=rule,
        attributes={"source": plan.name, **plan.attributes, **drawn},
        refused=refused,
        report=report,
        phrases=plan.phrases,
        sorts=plan.sorts,
    )


def loader(source: str) -> Callable[[Record, Rule], Loaded]:
    """What makes a sample of a record of this source."""
    special = {"cocostuff": cocostuff.load_classes, "labelme": labelme.load_shapes, "hdf5": paper.load}
    return special.get(source, records.load)


def notes(report: dict[str, Any]) -> tuple[str, ...]:
    """What a user should know of a data set that was converted, a line each.

    Args:
        report: Of a survey; once converted with `skipped`, `partly` and `empty`: phrase -> why.

    Returns:
        Lines; none if there is nothing to tell.
    """
    lines = []
    for split, counts in report["splits"].items():
        lines += _short(split or report["name"], counts["found"], counts["official"])
    if report["without_phrases"]:
        lines.append(f"without phrases: {report['without_phrases']} pictures, not written")
    if report["missing"]:
        lines.append(f"missing: {len(report['missing'])} pictures are not on disk: {_some(report['missing'])}")
    if count := report["unused"]["count"]:
        lines.append(f"unused: {count} pictures that no list names: {_some(report['unused']['first'], count)}")
    if report["exclusion"]:
        lines.append(report["exclusion"])
    for what, meaning in (
        ("skipped", "can't be drawn"),
        ("partly", "are drawn without a part"),
        ("empty", "have no text or no pixel, and are kept"),
    ):
        if names := report.get(what):
            said = [f"{name} ({why})" for name, why in list(names.items())[:NAMED]]
            lines.append(f"{what}: {len(names)} phrases {meaning}: {_some(said, len(names))}")
    return tuple(lines)


def _counts(plan: Plan, splits: tuple[str, ...]) -> dict[str, Any]:
    """Split -> what was found and what is official, of the splits that were asked for."""
    return {
        split: {
            "found": plan.found.get(split, Counts(0, 0))._asdict(),
            "official": known._asdict() if (known := plan.official.get(split)) else None,
        }
        for split in {**plan.official, **plan.found}
        if not splits or split in splits
    }


def _short(split: str, found: dict[str, Any], official: dict[str, Any] | None) -> list[str]:
    """A line if a split isn't what its makers published."""
    known = {what: count for what, count in (official or {}).items() if count is not None and found[what] is not None}
    if all(found[what] == count for what, count in known.items()):
        return []
    counts = " and ".join(f"{found[what]:,} {what} instead of {count:,}" for what, count in known.items())
    return [f"{split} is not the official split: {counts}"]


def _plan(config: PrepareConfig) -> Plan:
    if config.path is None:
        raise ConfigError(f"path: null; source {config.source} needs one, see docs/data.md")
    path, images, splits = Path(config.path).absolute(), config.images, config.splits
    match config.source:
        case "phrasecut":
            return phrasecut.plan(path, images, splits)
        case "refer":
            return refer.plan(path, images, splits)
        case "grefcoco":
            return grefcoco.plan(path, images, splits)
        case "coco":
            return coco.plan(path, images)
        case "cocostuff":
            return cocostuff.plan(path, images)
        case "labelme":
            return labelme.plan(path)
        case "hdf5":
            return paper.plan(path)
        case _:
            return folder.plan(path)


def _of_splits(plan: Plan, config: PrepareConfig) -> list[Record]:
    """Records of the wanted splits; a record's may be several, such as `train+val`."""
    if absent := [split for split in config.splits if split not in plan.found]:
        there = ", ".join(sorted(plan.found))
        raise ConfigError(f"splits: no picture of {config.path} is in {', '.join(absent)}; it has {there}")
    wanted = set(config.splits or plan.found)
    chosen = [r for r in plan.records if not wanted.isdisjoint(r.split.split("+"))]
    ids: set[str] = set()
    for record in chosen:
        if record.id in ids:
            raise DataError(f"{record.source}: the id {record.id!a} is there twice; ids must differ")
        ids.add(record.id)
    return chosen


def _check_enough(records: list[Record], refused: dict[str, str], config: PrepareConfig) -> None:
    """Raises if nothing is left to convert, or if something can't be and that isn't wanted."""
    why = _some(list(refused.values())) or "all are excluded"
    if not records:
        raise DataError(f"{config.path}: no picture is left to convert: {why}")
    if refused and config.on_error == "stop":
        raise DataError(
            f"{len(refused)} of {len(records) + len(refused)} pictures can't be had: {why}; "
            "fetch them, or leave them out by --on_error skip"
        )


def _missing(found: Iterable[Record]) -> list[Record]:
    """Records whose picture isn't on disk; each folder is listed once."""
    listed: dict[str, set[str]] = {}
    missing = []
    for record in found:
        parent, name = os.path.split(record.image)
        if parent not in listed:
            listed[parent] = set(os.listdir(parent)) if os.path.isdir(parent) else set()
        # A file system may take another Unicode form or case for the same name.
        if name not in listed[parent] and not os.path.isfile(record.image):
            missing.append(record)
    return missing


def _unused(plan: Plan) -> list[str]:
    """Pictures in the plan's folder that no list names."""
    if plan.folder is None:
        return []
    names = (entry.name for entry in os.scandir(plan.folder))
    return sorted(n for n in names if Path(n).suffix.lower() in SUFFIXES and n not in plan.listed)


def _some(names: list[str], count: int | None = None) -> str:
    """The first few names, and how many more there are."""
    more = (len(names) if count is None else count) - min(len(names), NAMED)
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
